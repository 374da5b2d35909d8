"""The process that computes the cases of a GPU check; experiments/gpu/watch.py starts it and says what."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from typing import Any


def main() -> None:
    """Arguments: the device, and tiny or full; the rest comes as JSON by standard input."""
    device, size = sys.argv[1:]
    sys.path.insert(0, os.path.join(os.getcwd(), "tools"))
    from checkout import use_checkout

    use_checkout()
    told = json.load(sys.stdin)
    deadline_s = time.monotonic() + told["seconds"]
    if device == "cpu":
        from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

        use_interpreter()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("megatron_medha").setLevel(logging.INFO)  # which library computes what
    from megatron_medha.worker.startup.megatron_import import import_megatron

    import_megatron(device)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no usable CUDA device; --device cpu --tiny rehearses the script")
    from experiments.gpu.measure import Check
    from experiments.gpu.parts import run_part

    with os.fdopen(told["pipe"], "w") as pipe:

        def say(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        say({"machine": machine()})
        check = Check(
            device=torch.device(device), is_tiny=size == "tiny", deadline_s=deadline_s, say=say,
            leave_out=frozenset((part, name) for part, name in told["leave_out"]), facts=told["facts"],
        )  # fmt: skip
        for name in told["parts"]:
            check.part = name
            run_part(name, check)
        say({"over": True})


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "flash_attn", "flash_attn_3", "transformer_engine", "megatron.core"):
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
    main()
