"""One script for a machine with a GPU: checks every kernel, measures what is promised, prints it beside the bars.

    python tools/gpu_check.py                         # everything, at most 9 minutes
    python tools/gpu_check.py --list                  # the parts
    python tools/gpu_check.py --part attention,decode # some; results of others are kept
    python tools/gpu_check.py --device cpu --tiny     # a rehearsal: every line of this runs, no figure means anything

Results go to one JSON file, after every part; a part that fails says so, with its traceback, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkout import ROOT, use_checkout  # noqa: E402

_MINUTES = 9.0
_LATEST = ROOT / "experiments" / "gpu" / "latest.json"


def main() -> int:
    """Run the parts; 1 if any of them failed, whatever the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="comma-separated; default: all")
    parser.add_argument("--list", action="store_true", help="print the parts and exit")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=f"when to stop (default {_MINUTES:g})")
    parser.add_argument("--out", type=Path, help="JSON; default: $OUT/gpu_check.json or experiments/gpu/latest.json")
    parser.add_argument("--also-failed", type=int, default=0, help=argparse.SUPPRESS)  # by the process before this one
    arguments = parser.parse_args()
    started_s = time.monotonic()
    use_checkout()
    if arguments.device == "cpu":
        if not arguments.tiny:
            parser.error("--device cpu needs --tiny: full sizes would take days")
        from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

        use_interpreter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("megatron_medha").setLevel(logging.INFO)  # which library computes what
    from megatron_medha.worker.startup.megatron_import import import_megatron

    import_megatron(arguments.device)
    parts = known_parts()
    if arguments.list:
        for name, part in parts.items():
            print(f"{name:<12}{(part.__doc__ or '').splitlines()[0]}")
        return 0
    wanted = list(parts) if arguments.part is None else arguments.part.split(",")
    if unknown := [name for name in wanted if name not in parts]:
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(parts)}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no usable CUDA device; --device cpu --tiny rehearses the script")
    from experiments.gpu.measure import Check

    beside = Path(os.environ["OUT"]) / "gpu_check.json" if "OUT" in os.environ else _LATEST
    path = arguments.out or beside
    results = earlier_results(path, arguments.tiny)
    check = Check(
        device=torch.device(arguments.device), is_tiny=arguments.tiny, deadline_s=started_s + 60 * arguments.minutes
    )
    check.facts.update(results.get("facts", {}))
    if not arguments.tiny and "rates" not in wanted and "matmul_flops_per_s" not in check.facts:
        wanted.insert(0, "rates")  # what the figures of others are shares of
    num_failed = run_parts([(name, parts[name]) for name in wanted], check, results, path, arguments.also_failed)
    print(f"--- {time.monotonic() - started_s:.0f} s; {num_failed} parts failed; {path}")
    return 1 if num_failed else 0


def earlier_results(path: Path, is_rehearsal: bool) -> dict[str, Any]:
    """What earlier runs of the same kind on the same chip have left, with this run's machine noted."""
    found = machine()
    for known in (path, _LATEST):
        if not known.exists() or (known != path and is_rehearsal):
            continue
        results: dict[str, Any] = json.loads(known.read_text())
        is_same_chip = results["machine"].get("chip") == found.get("chip")
        if results["is_rehearsal"] == is_rehearsal and is_same_chip:
            return {**results, "machine": found}
    if path.exists():
        kept = path.with_suffix(".earlier.json")
        print(f"--- {path} is of another chip or of a rehearsal; it is {kept.name} from now on", flush=True)
        path.replace(kept)
    return {"parts": {}, "machine": found, "is_rehearsal": is_rehearsal}


def run_parts(
    parts: Sequence[tuple[str, Callable[[Any], None]]], check: Any, results: dict[str, Any], path: Path, num_failed: int
) -> int:
    """One after another, with results written after each; how many have failed, those before included.

    Where a part leaves the device unusable for this process, those that are left run in another, in place of this one.
    """
    started_s = time.monotonic()
    for index, (name, part) in enumerate(parts):
        if not check.has_time(15):
            print(f"--- {name}: no time left; run it with --part {name}", flush=True)
            continue
        print(f"--- {name} ({time.monotonic() - started_s:.0f} s)", flush=True)
        check.rows = []
        error = run_part(part, check)
        num_failed += error is not None
        results["parts"][name] = {"rows": [row.as_dict() for row in check.rows], "error": error}
        results["facts"] = check.facts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        rest = [name for name, _ in parts[index + 1 :]]
        if error is not None and rest and not check.device_answers():
            print(f"--- the device does not answer this process any more; a new one runs {', '.join(rest)}", flush=True)
            minutes = (check.deadline_s - time.monotonic()) / 60
            words = ["--part", ",".join(rest), "--minutes", str(minutes), "--out", str(path)]
            os.execv(sys.executable, [sys.executable, __file__, *words, "--also-failed", str(num_failed)])
        check.free_memory()  # after the except clause: the exception held what the part had on the device
    return num_failed


def known_parts() -> dict[str, Callable[[Any], None]]:
    """By name, in the order they are worth running in: what later ones need first, the longest last."""
    from experiments.gpu import kernel_parts, model_parts

    return {
        "rates": kernel_parts.rates,
        "correctness": kernel_parts.correctness,
        "same_as_cpu": model_parts.same_as_cpu,
        "attention": kernel_parts.attention,
        "decode": kernel_parts.decode,
        "linear": kernel_parts.linear,
        "tpot": model_parts.tpot,
        "prefill": model_parts.prefill,
        "convoy": model_parts.convoy,
        "million": model_parts.million,
        "profile": model_parts.profile,
    }


def run_part(part: Callable[[Any], None], check: Any) -> str | None:
    """Its traceback if it fails; whatever one part breaks, the others are still worth their minutes."""
    try:
        part(check)
        check.synchronize()  # what fails on the device is said later, and is this part's
        return None
    except Exception:  # outermost: reported in the table, counted in the exit code
        error = traceback.format_exc()
        print(error, flush=True)
        return error


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "flash_attn", "transformer_engine", "megatron.core"):
        try:
            module = __import__(package, fromlist=["__version__"])
            versions[package] = getattr(module, "__version__", "unknown")
        except Exception as error:  # half-installed packages raise anything; it is only a note
            versions[package] = f"not usable: {type(error).__name__}"
    facts: dict[str, Any] = {"versions": versions, "cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["chip"] = properties.name
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            facts["driver"] = "nvidia-smi is not there"
    return facts


if __name__ == "__main__":
    sys.exit(main())
