"""How many slices row-parallel layers have (model.virtual_tp), so that any number of ranks adds up the same ones."""

from __future__ import annotations

from megatron_medha.core.errors import ConfigError
from megatron_medha.models.model_config import ModelConfig

_COUNTS = (8, 4, 2, 1)


def virtual_tp_of(setting: str, config: ModelConfig, *, tp: int, step: int = 1) -> int:
    """The number of slices; 1: layers are not sliced. setting: model.virtual_tp, "auto" or a number.

    auto: no more than there are groups of heads, as no more ranks can share them out. step: what inputs of a slice must
    be a multiple of.
    Raises ConfigError where the model cannot be cut into so many, or they cannot be shared out among tp ranks.
    """
    if setting == "1":
        return 1
    groups = config.num_kv_heads if config.latent is None else config.num_heads
    most = next(n for n in _COUNTS if not _undivided(config, n, step))
    count = next(n for n in _COUNTS if n <= most and groups % n == 0) if setting == "auto" else int(setting)
    way_out = "or model.virtual_tp=1, with other bits over parallel.tp"
    if undivided := _undivided(config, count, step):
        multiples = f" into multiples of {step}" if step > 1 else ""
        raise ConfigError(
            f"model.virtual_tp={setting}: must divide {', '.join(undivided)} of {config.name}{multiples}; "
            f"use model.virtual_tp={most}, auto, {way_out}"
        )
    if count % tp:
        raise ConfigError(
            f"parallel.tp={tp}: must divide model.virtual_tp={count}{' (auto)' if setting == 'auto' else ''}, and "
            f"{config.name} can have {most} at most; use such a parallel.tp, {way_out}"
        )
    return count


def _undivided(config: ModelConfig, count: int, step: int) -> list[str]:
    """The sizes that `count` slices do not divide, in words."""
    if count == 1:
        return []
    shape = config.shape(bytes_per_element=1)
    value_dim = config.head_dim if config.latent is None else config.latent.value_dim
    sizes = {
        "inputs of attention's projection": config.num_heads * value_dim,
        "model.ffn_hidden_size": shape.ffn_hidden_size,
        "model.shared_ffn_hidden_size": shape.shared_ffn_hidden_size,
        "model.dense_ffn_hidden_size": shape.dense_ffn_hidden_size,
    }
    return [f"{name}={size}" for name, size in sizes.items() if size % (count * step)]
