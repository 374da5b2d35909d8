"""How tokens are drawn where a request does not say: what the checkpoint's generation_config.json recommends."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_medha.core.errors import CheckpointError
from megatron_medha.safe_files.checkpoint_files import read_json_object, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """OpenAI's, where there is no other recommendation; do_sample and max_new_tokens are no part of it, as in vLLM."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0


OPENAI_DEFAULTS = SamplingDefaults()


def read_sampling_defaults(directories: Iterable[Path]) -> SamplingDefaults:
    """From the first generation_config.json in them. Raises CheckpointError for a value that no request might have."""
    path = next((d / "generation_config.json" for d in directories if (d / "generation_config.json").is_file()), None)
    if path is None:
        return OPENAI_DEFAULTS
    stated = read_json_object(path)
    top_k = _number(path, stated, "top_k", 0, -1, 2**31 - 1)
    if top_k != int(top_k):
        raise _wrong(path, stated, "top_k", "a whole number")
    found = SamplingDefaults(
        temperature=_number(path, stated, "temperature", 1.0, 0, 1e30),
        top_p=_number(path, stated, "top_p", 1.0, 1e-30, 1),
        top_k=max(int(top_k), 0),
        min_p=_number(path, stated, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(path, stated, "repetition_penalty", 1.0, 1e-30, 1e30),
    )
    log.info("sampling_defaults", extra={"fields": {"file": str(path), **dataclasses.asdict(found)}})
    return found


def _number(path: Path, stated: dict[str, object], key: str, default: float, least: float, most: float) -> float:
    value = stated.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _wrong(path, stated, key, f"a number from {least:g} to {most:g}")
    return float(value)


def _wrong(path: Path, stated: dict[str, object], key: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key}={shown(stated[key])} must be {wanted}; server.generation_config=none passes the file over"
    )
