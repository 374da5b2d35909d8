"""The two fronts that are compared, each over a simulated model: how they are started, and when their steps began."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.front_overhead.client import NUM_STREAMS, count_events
from experiments.lib.server_process import serving_process
from experiments.peers.install import install_vllm
from experiments.peers.servers import Server, peer, servers

_STEP_TIMES = struct.Struct("d")
_EXECUTOR = "experiments.front_overhead.vllm_executor.SimulatedExecutor"
_ROOT = Path(__file__).parents[2]
# vLLM puts tokens that wait into one event; every simulated one is this letter.
_LETTER = "a"
_TEXT = re.compile(rb'"text": ?"(a*)"')
_MAX_CONTEXT_LEN = 8192

StepStarts = dict[str, list[float]]  # by answer id: when each step began that gave it a token, one choice per answer


@dataclass(frozen=True, slots=True)
class Front:
    """A server over a simulated model."""

    port: int
    pid: int
    count: Callable[[bytes], int]        # tokens in the events of a stream
    set_step: Callable[[float], None]    # seconds; before a load
    step_starts: Callable[[], StepStarts] | None = None  # of all loads so far; None where they are not written down


@contextmanager
def ours(step_s: float, tokenizer: Path, core: int, checkout: Path | None, *, logs_steps: bool) -> Iterator[Front]:
    """This server. logs_steps: it writes its decisions down, which costs it CPU time as well."""
    with TemporaryDirectory() as directory:
        log = Path(directory) / "decisions.jsonl"
        overrides = (
            "runtime=sim", f"tokenizer={tokenizer}", "model=llama3_8b", "model.shape.vocab_size=250",
            "hardware=h100", "hardware.flops_per_s=1e21", "hardware.memory_bytes_per_s=1e21",
            "hardware.step_overhead_s=0", "hardware.layer_overhead_s=0", "hardware.kernel_overhead_s=0",
            f"engine.step_s={step_s}", "engine.sequence_s=0", "engine.stage_entry_s=0", "engine.layer_launch_s=0",
            "engine.request_s=0", f"scheduler.max_num_sequences={NUM_STREAMS}",
            *([f"tracking.decision_log={log}"] if logs_steps else []),
        )  # fmt: skip
        with serving_process(*overrides, core=core, checkout=checkout) as server:
            yield Front(
                server.port, server.process.pid, count_events, lambda _: None,
                (lambda: _of_decisions(log)) if logs_steps else None,
            )  # fmt: skip


@contextmanager
def vllm(tokenizer: Path, core: int, peers: Path, log: Path) -> Iterator[Front]:
    """vLLM with its own defaults, its two processes on that core; installed below `peers` if it is not there."""
    install_vllm(peers, Path())
    usual = servers(threads=1)["vllm"]
    with TemporaryDirectory() as name:
        directory = Path(name)
        steps, step = directory / "steps", directory / "step_s"
        step.write_bytes(_STEP_TIMES.pack(0.01))
        _write_checkpoint(directory, tokenizer)
        vocab = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        simulated = {
            "PYTHONPATH": str(_ROOT), "SIMULATED_STEP": str(step), "SIMULATED_LOG": str(steps),
            "SIMULATED_TOKEN": str(vocab[_LETTER]),
        }  # fmt: skip

        def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
            serve = [str(peers / "vllm" / "bin" / "vllm"), "serve", str(checkpoint), "--served-model-name", "peer"]
            where = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(_MAX_CONTEXT_LEN)]
            model = ["--distributed-executor-backend", _EXECUTOR]
            return ["taskset", "--cpu-list", str(core), *serve, *where, *model]

        server = Server("vllm", install_vllm, command, lambda peers: {**usual.environment(peers), **simulated})
        with peer(server, peers, directory, log) as (running, _):
            yield Front(
                running.port, running.process.pid, _count_letters, lambda step_s: _set_step(step, step_s),
                lambda: _of_lines(steps),
            )  # fmt: skip


def _count_letters(events: bytes) -> int:
    return sum(map(len, _TEXT.findall(events)))


def _set_step(path: Path, step_s: float) -> None:
    with path.open("r+b") as file:  # in place: it is mapped
        file.write(_STEP_TIMES.pack(step_s))


def _of_decisions(path: Path) -> StepStarts:
    starts: StepStarts = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            for request_id, _, _, samples_token, *_ in record.get("batch", {}).get("chunks", ()):
                if samples_token:
                    starts[_answer_id(request_id)].append(record["now_s"])
    return starts


def _of_lines(path: Path) -> StepStarts:
    starts: StepStarts = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        began_s, *request_ids = line.split()
        for request_id in request_ids:
            starts[_answer_id(request_id)].append(float(began_s))
    return starts


def _answer_id(request_id: str) -> str:
    """Both call a choice KIND-ANSWER-CHOICE, and vLLM goes on."""
    return "-".join(request_id.split("-")[:2])


def _write_checkpoint(directory: Path, tokenizer: Path) -> None:
    """What vLLM wants to see of a model whose weights nobody loads."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (tokenizer / name).is_file():
            sys.exit(f"--tokenizer {tokenizer}: {name} is missing")
        shutil.copy(tokenizer / name, directory)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "vocab_size": 512, "max_position_embeddings": _MAX_CONTEXT_LEN, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
