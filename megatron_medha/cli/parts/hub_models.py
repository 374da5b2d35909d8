"""Models of the Hugging Face hub, as ORG/NAME or ORG/NAME@REVISION: downloaded once, then read from the cache."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from megatron_medha.core.errors import CheckpointError, ConfigError, UnsupportedModelError

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_WEIGHTS = "*.safetensors"
_NOT_READ = ("*/*", "consolidated*")  # other formats of the same weights, and what lies in folders


def hub_name(given: Path | None) -> str | None:
    """What is a name on the hub rather than a path: ORG/NAME where neither that nor a directory ORG exists."""
    text = str(given)
    if given is None or _NAME.fullmatch(text) is None or given.exists() or Path(text.partition("/")[0]).is_dir():
        return None
    return text


def local_directory(key: str, given: Path | None, *, has_weights: bool = True) -> Path | None:
    """The directory to read: what was given, or a copy of the hub's model. Raises ConfigError if it cannot be had.

    has_weights: of a tokenizer only the small files are needed.
    """
    if (name := hub_name(given)) is None:
        return given
    try:
        directory = _snapshot(name, _SMALL_FILES)
        if has_weights:
            _check_before_weights(directory)
            directory = _snapshot(name, (*_SMALL_FILES, _WEIGHTS))
    except _download_errors() as error:
        raise ConfigError(f"{key}={name}: no such directory, and {_why(name, error)}") from None
    if has_weights and not any(directory.glob(_WEIGHTS)):
        raise ConfigError(
            f"{key}={name}: no *.safetensors of it are here; it has none, or they were not downloaded before and the "
            "Hugging Face hub cannot be reached now"
        )
    return directory


def local_file(key: str, name: str, file: str) -> Path:
    """One file of the hub's model. Raises ConfigError if it cannot be had."""
    try:
        path = _snapshot(name, (file,)) / file
    except _download_errors() as error:
        raise ConfigError(f"{key}={name}: no such directory, and {_why(name, error)}") from None
    if not path.is_file():
        raise ConfigError(f"{key}={name}: the model on the Hugging Face hub has no {file}")
    return path


def _check_before_weights(directory: Path) -> None:
    """Raises ConfigError for a model that would be refused after hours of downloading."""
    from megatron_medha.worker.startup.early_check import check_config

    if (directory / "config.json").is_file():
        try:
            check_config(directory)
        except (CheckpointError, UnsupportedModelError) as error:
            raise ConfigError(str(error)) from None


@functools.cache
def _snapshot(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    match = _NAME.fullmatch(name)
    assert match is not None
    return Path(snapshot_download(
        match["repo"], revision=match["revision"], allow_patterns=[*patterns], ignore_patterns=[*_NOT_READ]
    ))  # fmt: skip


def _download_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)


def _why(name: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = name.partition("@")[0]
    match error:
        case GatedRepoError():
            return f"its terms must be accepted first, at https://huggingface.co/{repo}, and HF_TOKEN set"
        case RepositoryNotFoundError():
            return (
                f"the Hugging Face hub has no model {repo} that can be seen without another HF_TOKEN; "
                "`medha train-tiny` makes a small one in checkpoints/tiny"
            )
        case RevisionNotFoundError():
            return f"the model {repo} has no such revision"
        case LocalEntryNotFoundError() if HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set and {repo} is not in the cache; give a directory, or unset it"
        case LocalEntryNotFoundError():
            return (
                f"the Hugging Face hub cannot be reached and {repo} is not in its cache; give a directory, or run "
                f"`hf download {repo}` where there is a network and copy it here"
            )
    return f"the download failed: {str(error).strip().partition(chr(10))[0]}"
