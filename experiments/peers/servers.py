"""The servers that are compared: how each is started, found ready and ended. How peers are installed is install.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.server_process import Server as Running
from experiments.lib.server_process import free_port, started
from experiments.peers.install import install_llama, install_nothing, install_vllm

READY_TIMEOUT_S = 600.0  # vLLM compiles at its first start
MAX_CONTEXT_LEN = 65536
KV_GIB = 3


@dataclass(frozen=True, slots=True)
class Server:
    """One way to serve the checkpoint."""

    name: str
    install: Callable[[Path, Path], None]             # (folder of the peers, checkpoint); nothing the second time
    command: Callable[[Path, Path, int], list[str]]   # (the same, port)
    environment: Callable[[Path], dict[str, str]] = lambda peers: {}
    ready_path: str = "/health"
    knows_priority: bool = False   # shorts are sent with priority 0, longs with 1: the caller has to know

    @property
    def is_ours(self) -> bool:
        """Or one of our variants."""
        return self.name.startswith("medha")


def servers(threads: int, ours: Sequence[str] = (), variants: Sequence[str] = ()) -> dict[str, Server]:
    """By name: ours, and each peer by default and as best tuned against the convoy.

    ours: overrides for every server of ours; variants: NAME=OVERRIDE,OVERRIDE adds medha-NAME.
    """
    known = [
        _medha("medha", threads, ours),
        _vllm("vllm", threads),
        _vllm("vllm-float32", threads, "--dtype", "float32"),  # for CPUs without bf16 instructions
        _vllm("vllm-cap-64", threads, *_capped(64)),
        _vllm("vllm-float32-cap-64", threads, "--dtype", "float32", *_capped(64)),
        _vllm("vllm-cap-128", threads, *_capped(128)),
        _llama("llama.cpp", threads),
        _llama("llama.cpp-b256", threads, "-fa", "off", "-ctk", "bf16", "-ctv", "bf16", "-b", "256", "-ub", "256"),
    ]
    for variant in variants:
        name, _, overrides = variant.partition("=")
        known.append(_medha(f"medha-{name}", threads, [*ours, *overrides.split(",")]))
    return {server.name: server for server in known}


def _medha(name: str, threads: int, overrides: Sequence[str]) -> Server:
    def command(_: Path, checkpoint: Path, port: int) -> list[str]:
        serve = [sys.executable, "-m", "megatron_medha", "serve", f"checkpoint={checkpoint}", f"server.port={port}"]
        memory = [f"model.max_context_len={MAX_CONTEXT_LEN}", f"model.kv_memory_gib={KV_GIB}"]
        return [*serve, *memory, f"model.num_threads={threads}", *overrides]

    return Server(name, install_nothing, command, ready_path="/ready")


def _capped(tokens: int) -> list[str]:
    """vLLM's way out of the convoy: small steps, of which no long prompt gets more than so many tokens."""
    cap = ["--max-num-batched-tokens", "512", "--long-prefill-token-threshold", str(tokens)]
    return ["--no-enable-prefix-caching", "--scheduling-policy", "priority", *cap]


def _vllm(name: str, threads: int, *flags: str) -> Server:
    def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
        serve = [str(peers / "vllm" / "bin" / "vllm"), "serve", str(checkpoint), "--served-model-name", "peer"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [*serve, *where, "--max-model-len", str(MAX_CONTEXT_LEN), *flags]

    def environment(peers: Path) -> dict[str, str]:
        # What its documentation advises; tcmalloc where the machine has it.
        found = [*(peers / "vllm").glob("lib/libiomp5.so"), find_library("tcmalloc_minimal")]
        return {
            "LD_PRELOAD": ":".join(str(library) for library in found if library),
            "VLLM_CACHE_ROOT": str(peers / "vllm" / "cache"),  # of what it compiled: minutes at the first start
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            # Left alone it reserves one core for its scheduler: a single computing thread on two cores.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        }

    return Server(name, install_vllm, command, environment, knows_priority="priority" in flags)


def _llama(name: str, threads: int, *flags: str) -> Server:
    def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
        binary = peers / "llama.cpp" / "build" / "bin" / "llama-server"
        serve = [str(binary), "-m", str(peers / f"{checkpoint.name}.gguf"), "-t", str(threads)]
        # -c is the sum over the slots.
        slots = ["-np", "16", "-c", str(16 * 40960)]
        return [*serve, *slots, "--host", "127.0.0.1", "--port", str(port), *flags]

    return Server(name, install_llama, command)


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
