"""Whether a workload of sessions fits into a server's context, and what makes it fit."""

from __future__ import annotations

from dataclasses import replace
from math import floor, log10

from megatron_medha.core.errors import ConfigError
from megatron_medha.workload.session_mix import SessionsConfig
from megatron_medha.workload.workload import Workload, WorkloadConfig

_LEAST_SCALE = 1e-4  # below, every text is one token long


def check_fits(workload: Workload, seed: int, max_tokens: int | None) -> None:
    """Raise ConfigError if a session grows beyond max_tokens, of prompt and answer together; None: nobody knows."""
    config, longest = workload.config, workload.facts.max_request_tokens
    if config.sessions is None or max_tokens is None or longest <= max_tokens:
        return
    what = f"the longest turn has {longest:,} tokens with its answer, and the server takes {max_tokens:,}"
    if config.path is not None:
        raise ConfigError(
            f"workload.path={config.path}: {what} (max_model_len of /v1/models); use shorter sessions, or a model with "
            "a longer context"
        )
    scale = _fitting_scale(config, config.sessions, seed, max_tokens, longest)
    way_out = (
        f"use workload.sessions.length_scale={scale:g}" if scale is not None
        else "use fewer turns (workload.sessions.turns), or a model with a longer context"
    )  # fmt: skip
    raise ConfigError(
        f"workload.sessions.length_scale={config.sessions.length_scale:g}: {what} (max_model_len of /v1/models); "
        f"{way_out}"
    )


def _fitting_scale(
    config: WorkloadConfig, sessions: SessionsConfig, seed: int, max_tokens: int, longest: int
) -> float | None:
    """A scale of two digits with which every turn fits; None if there is none."""
    scale = sessions.length_scale * max_tokens / longest
    while scale >= _LEAST_SCALE:
        unit = 10.0 ** (floor(log10(scale)) - 1)
        rounded = float(f"{floor(scale / unit) * unit:.2g}")
        scaled = Workload(replace(config, sessions=replace(sessions, length_scale=rounded)), seed)
        if scaled.facts.max_request_tokens <= max_tokens:
            return rounded
        scale = rounded * 0.9
    return None
