"""The servers that are compared: how each is started, found ready and ended. How peers are installed is install.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.lib.instruction_sets import instruction_sets
from experiments.lib.server_process import Server as Running
from experiments.lib.server_process import free_port, started
from experiments.peers.install import gguf_path, install_llama, install_nothing, install_vllm, write_no_bf16
from experiments.peers.models import SMALL, Model

READY_TIMEOUT_S = 600.0  # vLLM compiles at its first start
# oneDNN's newest instruction set without bf16; ours and vLLM's linear layers use it.
_NO_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}


@dataclass(frozen=True, slots=True)
class Server:
    """One way to serve the checkpoint."""

    name: str
    install: Callable[[Path, Path], None]             # (folder of the peers, checkpoint); nothing the second time
    command: Callable[[Path, Path, int], list[str]]   # (the same, port)
    environment: Callable[[Path], dict[str, str]] = lambda peers: {}
    ready_path: str = "/health"
    knows_priority: bool = False   # shorts are sent with priority 0, longs with 1: the caller has to know
    warm_up_tokens: int = 4096     # the longest prompt before anything is measured

    @property
    def is_ours(self) -> bool:
        """Or one of our variants."""
        return self.name.startswith("medha")


def servers(
    threads: int, ours: Sequence[str] = (), variants: Sequence[str] = (), *, model: Model = SMALL,
    with_bf16: bool = True,
) -> dict[str, Server]:  # fmt: skip
    """By name: ours, and each peer by default and as best tuned against the convoy.

    ours: overrides for every server of ours; variants: NAME=OVERRIDE,OVERRIDE adds medha-NAME.
    with_bf16: False switches the CPU's bf16 instructions and tiles off in all of them.
    """
    medha, vllm = partial(_medha, threads, model, with_bf16), partial(_vllm, threads, model, with_bf16)
    llama = partial(_llama, threads, model, with_bf16)
    few = model.llama_slots * model.llama_slot_tokens // 32 // 256 * 256
    known = [
        medha("medha", ours),
        vllm("vllm"),
        vllm("vllm-float32", "--dtype", "float32"),  # for CPUs without bf16 instructions
        vllm("vllm-cap-64", "--no-enable-prefix-caching", *_capped(64)),
        vllm("vllm-cap-64-cached", *_capped(64)),    # for sessions beside the mixed stream
        vllm("vllm-float32-cap-64", "--no-enable-prefix-caching", "--dtype", "float32", *_capped(64)),
        vllm("vllm-cap-128", "--no-enable-prefix-caching", *_capped(128)),
        llama("llama.cpp"),
        llama("llama.cpp-b256", "-fa", "off", "-ctk", "bf16", "-ctv", "bf16", "-b", "256", "-ub", "256"),
        llama("llama.cpp-f16", weights="f16"),
        llama("llama.cpp-q8_0", weights="q8_0"),
        llama("llama.cpp-32-slots", slots=(32, few)),   # for decodes at batch 32
        llama("llama.cpp-f16-32-slots", weights="f16", slots=(32, few)),
        llama("llama.cpp-q8_0-32-slots", weights="q8_0", slots=(32, few)),
    ]
    for variant in variants:
        name, _, overrides = variant.partition("=")
        known.append(medha(f"medha-{name}", [*ours, *overrides.split(",")]))
    return {server.name: server for server in known}


def _medha(threads: int, model: Model, with_bf16: bool, name: str, overrides: Sequence[str]) -> Server:
    def command(_: Path, checkpoint: Path, port: int) -> list[str]:
        serve = [sys.executable, "-m", "megatron_medha", "serve", f"checkpoint={checkpoint}", f"server.port={port}"]
        memory = [f"model.max_context_len={model.max_context_len}", f"model.kv_memory_gib={model.kv_gib}"]
        kernels = [] if with_bf16 else [f"model.instruction_set={_without_bf16()}"]
        return [*serve, *memory, f"model.num_threads={threads}", *kernels, *overrides]

    def environment(_: Path) -> dict[str, str]:
        return {} if with_bf16 else _NO_BF16

    return Server(name, install_nothing, command, environment, ready_path="/ready")


def _without_bf16() -> str:
    """The best instruction set of our kernels that has no bf16 instructions."""
    return "avx512" if "avx512f" in instruction_sets() else "avx2"


def _capped(tokens: int) -> list[str]:
    """vLLM's way out of the convoy: small steps, of which no long prompt gets more than so many tokens."""
    cap = ["--max-num-batched-tokens", "512", "--long-prefill-token-threshold", str(tokens)]
    return ["--scheduling-policy", "priority", *cap]


def _vllm(threads: int, model: Model, with_bf16: bool, name: str, *flags: str) -> Server:
    def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
        serve = [str(peers / "vllm" / "bin" / "vllm"), "serve", str(checkpoint), "--served-model-name", "peer"]
        where = ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
        return [*serve, *where, "--max-model-len", str(model.max_context_len), *flags]

    def environment(peers: Path) -> dict[str, str]:
        # What its documentation advises; tcmalloc where the machine has it.
        found = [*(peers / "vllm").glob("lib/libiomp5.so"), find_library("tcmalloc_minimal")]
        bf16 = {} if with_bf16 else {**_NO_BF16, "PYTHONPATH": str(write_no_bf16(peers))}
        return {
            **bf16,
            "LD_PRELOAD": ":".join(str(library) for library in found if library),
            # Of what it compiled: minutes at the first start.
            "VLLM_CACHE_ROOT": str(peers / "vllm" / ("cache" if with_bf16 else "cache-no-bf16")),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(model.kv_gib),
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            # Left alone it reserves one core for its scheduler: a single computing thread on two cores.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        }

    return Server(name, install_vllm, command, environment, knows_priority="priority" in flags)


def _llama(
    threads: int, model: Model, with_bf16: bool, name: str, *flags: str, weights: str = "bf16",
    slots: tuple[int, int] | None = None,
) -> Server:  # fmt: skip
    num_slots, slot_tokens = slots or (model.llama_slots, model.llama_slot_tokens)

    def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
        binary = peers / "llama.cpp" / "build" / "bin" / "llama-server"
        serve = [str(binary), "-m", str(gguf_path(peers, checkpoint, weights)), "-t", str(threads)]
        # -c is the sum over the slots.
        context = ["-np", str(num_slots), "-c", str(num_slots * slot_tokens)]
        return [*serve, *context, "--host", "127.0.0.1", "--port", str(port), *flags]

    def environment(peers: Path) -> dict[str, str]:
        return {} if with_bf16 else {"LD_LIBRARY_PATH": str(peers / "llama.cpp" / "build-no-bf16" / "bin")}

    install = partial(install_llama, weights=weights, with_bf16=with_bf16)
    warm_up_tokens = min(4096, slot_tokens // 2)
    return Server(name, install, command, environment, warm_up_tokens=warm_up_tokens)


@contextmanager
def peer(server: Server, peers: Path, checkpoint: Path, log: Path) -> Iterator[tuple[Running, list[str]]]:
    """The server once it is ready, and the flags of its command line without what is the same for every start."""
    port = free_port()
    command = server.command(peers, checkpoint, port)
    with started(
        command, port, ready_path=server.ready_path, environment=server.environment(peers), log=log,
        timeout_s=READY_TIMEOUT_S,
    ) as running:  # fmt: skip
        yield running, [word for word in command[1:] if "/" not in word and str(port) not in word]
