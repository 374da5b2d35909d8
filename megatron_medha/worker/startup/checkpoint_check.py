"""What a rank would load and have room for, from configs and headers alone: no weight is read, no model is built.

`python -m megatron_medha.worker.startup.checkpoint_check '<RankConfig as JSON>' PARENT_PID` prints why that would be
refused and exits with 2, or prints nothing.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from megatron_medha.checkpoints.detect import find_checkpoint, read_model_config
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.model.build import check_layout_of
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.system.libc import set_pdeathsig
from megatron_medha.worker.startup.device import context_len_of, device_of, dtype_of

_GIB = 1 << 30
_MAX_DEGREE = 64


def checkpoint_facts(config: RankConfig) -> Iterator[tuple[str, str]]:
    """What it is, what it takes, and the degrees that divide it: a word and a line for each.

    Raises what loading would: CheckpointError and UnsupportedModelError for the checkpoint, ConfigError for options.
    """
    kind, home = find_checkpoint(Path(config.checkpoint))
    model, layout = read_model_config(config.checkpoint), config.layout
    device = device_of(config.model.device)
    dtype = dtype_of(config.model.dtype, model.dtype, device)
    context_len = context_len_of(config.model.max_context_len, model.max_context_len)
    check_layout_of(model, tp=layout.tp, spp=layout.spp)
    shape = model.shape(dtype.itemsize)
    yield "checkpoint", f"{kind.looked_for.split(' (')[0]}: {home}"
    yield "model", _sizes(model)
    yield "traits", ", ".join(model.traits) or "Llama's"
    yield "layers", "written for inference" if model.is_llama_like else "Megatron's own, over paged KV (docs/models.md)"
    weights = shape.num_params * dtype.itemsize / _GIB
    dtype_name = str(dtype).removeprefix("torch.")
    each = f", {weights / (layout.tp * layout.spp):.3g} on each rank" if layout.tp * layout.spp > 1 else ""
    yield "weights", f"{_short(shape.num_params)} parameters, {weights:.3g} GiB in {dtype_name}{each}"
    if shape.num_active_params < 0.9 * shape.num_params and model.experts is not None:
        yield "active", f"{_short(shape.num_active_params)} parameters for each token"
    stage_share = max(shape.num_stage_layers(stage, layout.spp) for stage in range(layout.spp)) / shape.num_layers
    token_bytes = shape.kv_bytes_per_token / min(layout.tp, shape.num_cached_heads) * stage_share
    longest = context_len * token_bytes / layout.kvp / _GIB
    yield "KV", f"{token_bytes:,.0f} bytes for a token on each rank; {context_len:,} tokens take {longest:.3g} GiB"
    if config.kv_memory_bytes is not None:
        num_tokens = int(config.kv_memory_bytes / token_bytes) * layout.kvp
        yield "memory", f"{config.kv_memory_bytes / _GIB:.3g} GiB for KV on each rank: {num_tokens:,} tokens at a time"
    degrees = {axis: [n for n in range(1, _MAX_DEGREE + 1) if _divides(model, **{axis: n})] for axis in ("tp", "spp")}
    yield "layouts", "; ".join(f"parallel.{axis}={', '.join(map(str, found))}" for axis, found in degrees.items())


def main(argv: Sequence[str]) -> int:
    """Check as the only work of a process, which ends with the one that started it."""
    config = msgspec.json.decode(argv[0], type=RankConfig)
    set_pdeathsig(int(argv[1]))
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there what is none of our reasons
            for _ in checkpoint_facts(config):
                pass
    except MedhaError as error:
        print(error)
        return 2
    return 0


def _sizes(model: ModelConfig) -> str:
    heads = f"{model.num_heads} heads of {model.head_dim}"
    heads += f" ({model.num_kv_heads} of keys and values)" if model.latent is None else ""
    mixture = model.experts
    experts = f", {mixture.num_experts} experts of which {mixture.num_per_token} a token" if mixture is not None else ""
    return (
        f"{model.num_layers} layers of {model.hidden_size}, {heads}{experts}, vocabulary {model.vocab_size:,}, "
        f"context {model.max_context_len:,}"
    )


def _divides(model: ModelConfig, tp: int = 1, spp: int = 1) -> bool:
    try:
        check_layout_of(model, tp=tp, spp=spp)
    except ConfigError:
        return False
    return True


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
