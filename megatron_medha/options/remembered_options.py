"""Options composed before: the same words, files and code give the same options, and Hydra need not be imported.

Importing and running Hydra takes half of the time until a server listens. What it made is kept in the user's cache
under a digest of all that went into it. Keys and passwords are not: options that hold one, or that read the
environment, are composed anew each time.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from megatron_medha.server.server_config import SECRET_FIELDS
from megatron_medha.system import machine
from megatron_medha.system.user_cache import user_cache

CONF_MODULE = "megatron_medha.conf"
MAX_FILES = 32  # of a few KB; a person has fewer ways to start a server

T = TypeVar("T")

log = logging.getLogger(__name__)

# Not loaded yet when the digest is made, and part of what makes the options.
_COMPOSERS = ("megatron_medha.options.compose", "megatron_medha.options.option_errors", "hydra", "omegaconf")
_OUTSIDE_WORLD = re.compile(r"\$\{(?!machine:)[\w.]+:")        # ${oc.env:X} and its like, but not ${server.port}


def digest_of(name: str, overrides: Sequence[str]) -> str:
    """Of all that composing depends on: words, machine, option files, and the code that reads them."""
    digest = hashlib.sha256()
    facts = (sys.version, machine.cpu_flops_per_s(), machine.memory_bytes_per_s(), name, *overrides)
    digest.update(repr(facts).encode())
    root = importlib.resources.files(CONF_MODULE)
    assert isinstance(root, Path), "conf/ is a folder of files"
    for path in sorted(root.rglob("*.yaml")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    ours = [module.__file__ for key, module in sys.modules.items() if key.startswith("megatron_medha.")]
    others = [spec.origin for key in _COMPOSERS if (spec := importlib.util.find_spec(key)) is not None]
    for file in sorted(filter(None, [*ours, *others])):
        stat = os.stat(file)
        digest.update(f"{file}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def recall(digest: str, config_class: type[T]) -> T | None:
    """What was composed from all that has this digest; None if that is not known."""
    try:
        values = msgspec.msgpack.decode(_path(digest).read_bytes())
        return msgspec.convert(values, config_class, dec_hook=decode_path)
    except (OSError, RuntimeError):  # not there; no home directory
        return None
    except msgspec.MsgspecError as error:  # a broken file, or one that options name has gone: Hydra says it well
        log.debug("options_not_recalled reason=%s", error)
        return None


def remember(digest: str, values: dict[str, Any], unresolved: str) -> None:
    """Keep what was composed, for recall(). unresolved: the same as YAML, with ${...} as written."""
    if _OUTSIDE_WORLD.search(unresolved) or any(values["server"][name] is not None for name in SECRET_FIELDS):
        return
    try:
        path = _path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.msgpack.encode(values))
        draft.replace(path)
        oldest_first = sorted(path.parent.glob("*.msgpack"), key=lambda one: one.stat().st_mtime_ns)
        for old in oldest_first[:-MAX_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        log.debug("options_not_remembered reason=%s", error)


def decode_path(kind: type, value: Any) -> Any:
    """For msgspec: a Path from its text."""
    if kind is Path and isinstance(value, str):
        if not value:  # checkpoint=$UNSET; a Path would make the current directory of it
            raise ValueError("Expected a path, got an empty text")
        return Path(value)
    raise TypeError(f"expected {kind.__name__}, got {value!r}")


def _path(digest: str) -> Path:
    return user_cache() / "options" / f"{digest}.msgpack"
