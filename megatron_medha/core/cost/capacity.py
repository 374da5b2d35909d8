"""Which models fit on which devices: weights, activations and KV blocks of every rank under a layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.cost.kernel_costs import ACTIVATION_BYTES
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape

_GIB = 1 << 30
_LOGIT_BYTES = 4       # rows that are sampled from are widened to fp32
_MAX_DEGREE = 1024     # of pipeline stages, where a way out is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What of a device's memory KV may take. The defaults are those of vLLM's memory share and of our batches."""

    block_size: int = 16           # tokens
    utilisation: float = 0.9       # of a device's memory; the rest is for the driver, NCCL and fragmentation
    max_batch_tokens: int = 8192   # of one step, all of whose activations have to fit
    max_num_sequences: int = 256   # rows of one step that are sampled from

    def __post_init__(self) -> None:
        if not 0.0 < self.utilisation <= 1.0:
            raise ConfigError(f"memory.utilisation={self.utilisation:g}: must be above 0 and at most 1")
        for key in ("block_size", "max_batch_tokens", "max_num_sequences"):
            if getattr(self, key) < 1:
                raise ConfigError(f"memory.{key}={getattr(self, key)}: must be at least 1")


@dataclass(frozen=True, slots=True)
class MemoryFootprint:
    """Bytes of one rank of a pipeline stage."""

    weights: float
    activations: float
    block: int     # of KV, on this rank
    budget: float  # for all of them

    @property
    def num_blocks(self) -> int:
        """Blocks that fit beside weights and activations; negative where not even those fit."""
        return int((self.budget - self.weights - self.activations) // self.block)


def _undivided(model: ModelShape, tp: int, spp: int) -> str:
    """The sizes of a model that the degrees do not divide, in words; empty if they divide all."""
    sizes = ("num_heads", "num_kv_heads", "ffn_hidden_size", "shared_ffn_hidden_size", "dense_ffn_hidden_size")
    counts = {key: getattr(model, key) for key in sizes}  # 0 is divided by any
    reasons = []
    if undivided := [f"model.{key}={count}" for key, count in counts.items() if count % tp]:
        reasons.append(
            f"parallel.tp={tp} must divide {', '.join(undivided)} of {model.name}; "
            f"tp={gcd(*counts.values())} and its divisors divide all that tp shares out"
        )
    if model.num_layers % spp:
        reasons.append(f"parallel.spp={spp} must divide model.num_layers={model.num_layers} of {model.name}")
    return "; ".join(reasons)


def check_divides(model: ModelShape, *, tp: int, spp: int) -> None:
    """Raises ConfigError, with every size that the degrees do not divide: one rule for plans and servers."""
    if reasons := _undivided(model, tp, spp):
        raise ConfigError(reasons)


def check_layout(shape: ModelShape, hardware: Hardware, layout: ParallelLayout) -> None:
    """Raises ConfigError if the degrees do not divide the model, or are more than the devices."""
    check_divides(shape, tp=layout.tp, spp=layout.spp)
    check_devices(hardware, layout)


def check_devices(hardware: Hardware, layout: ParallelLayout) -> None:
    """Raises ConfigError if the layout needs more devices than there are."""
    if layout.world_size > hardware.num_devices:
        raise ConfigError(
            f"hardware.num_devices={hardware.num_devices} of {hardware.name}: tp={layout.tp} x spp={layout.spp} x "
            f"kvp={layout.kvp} x dp={layout.dp} needs {layout.world_size}; take a larger cluster or smaller degrees"
        )


def cluster_for(hardware: Hardware, layout: ParallelLayout) -> Hardware:
    """A single device (hardware=a100) stands for as many as the layout needs; a cluster (a100_x16) is what it is."""
    return replace(hardware, num_devices=layout.world_size) if hardware.num_devices == 1 else hardware


def num_blocks_in(shape: ModelShape, layout: ParallelLayout, kv_memory_gib: float, block_size: int) -> int:
    """KV blocks of one KVP rank where so much of each device's memory is given to them; the fullest stage decides.

    Raises ConfigError if that is too little for one.
    """
    num_layers = max(shape.num_stage_layers(stage, layout.spp) for stage in range(layout.spp))
    share = num_layers / shape.num_layers / min(layout.tp, shape.num_cached_heads)
    block_bytes = block_size * shape.kv_bytes_per_token * share
    num_blocks = int(kv_memory_gib * _GIB / block_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"model.kv_memory_gib={kv_memory_gib:g}: too small for one block of {block_size} tokens, "
            f"which takes {block_bytes / _GIB:.2g} GiB on each device"
        )
    return num_blocks


def stage_footprint(
    shape: ModelShape, hardware: Hardware, layout: ParallelLayout, stage: int, reserve: MemoryBudget
) -> MemoryFootprint:
    """What a rank of this stage holds: its layers cut by tp, the embedding on the first stage, the head on the last.

    Raises ConfigError if the hardware's memory is not known.
    """
    if hardware.memory_bytes is None:
        raise ConfigError(
            f"hardware.memory_bytes=null of {hardware.name}: nothing can be laid out on a device of unknown memory; "
            "give bytes, or take another hardware"
        )
    tp, layers = layout.tp, shape.num_stage_layers(stage, layout.spp)
    before = sum(shape.num_stage_layers(each, layout.spp) for each in range(stage))
    params = shape.num_params_of_layers(before, layers)
    is_first, is_last = stage == 0, stage == layout.spp - 1
    if is_first:
        # The embedding has the head's size.
        params += shape.num_head_params + shape.num_learned_positions * shape.hidden_size * tp  # on every rank whole
    if is_last and not (is_first and shape.has_tied_embeddings):
        params += shape.num_head_params
    # The residual, its norm, a layer's input and output; queries, keys, values and the attention's output;
    # gate, up and their product, of one layer at a time.
    widths = 4 * shape.hidden_size + (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / tp
    widths += shape.num_mlp_numbers / tp
    activations = reserve.max_batch_tokens * widths * ACTIVATION_BYTES
    if is_last:
        activations += min(reserve.max_num_sequences, reserve.max_batch_tokens) * shape.vocab_size * _LOGIT_BYTES
    # Ranks beyond the number of KV heads repeat one.
    kv_heads = max(1, shape.num_cached_heads // tp)
    return MemoryFootprint(
        weights=params / tp * shape.bytes_per_element,
        activations=activations,
        block=2 * layers * kv_heads * shape.cached_dim * shape.kv_element_bytes * reserve.block_size,
        budget=hardware.memory_bytes * reserve.utilisation,
    )


def num_kv_blocks(
    shape: ModelShape,
    hardware: Hardware,
    layout: ParallelLayout,
    reserve: MemoryBudget,
    *,
    num_tokens: int = 1,
) -> int:
    """KV blocks of one KVP rank: as many as the fullest of its stages can hold.

    num_tokens: of one request that must fit on all KVP ranks together. Raises ConfigError, with the numbers and with a
    layout that would do, if they do not fit, and whatever check_layout and stage_footprint raise.
    """
    check_layout(shape, hardware, layout)
    footprints = [stage_footprint(shape, hardware, layout, stage, reserve) for stage in range(layout.spp)]
    fullest = min(footprints, key=lambda footprint: footprint.num_blocks)
    num_blocks = fullest.num_blocks
    if num_blocks >= 1 and num_blocks * reserve.block_size * layout.kvp >= num_tokens:
        return num_blocks
    stage = footprints.index(fullest)
    where = f"{shape.name} on {hardware.name} with tp={layout.tp} spp={layout.spp} kvp={layout.kvp}"
    uses = (
        f"a rank of stage {stage} may use {fullest.budget / _GIB:.1f} GiB; weights take "
        f"{fullest.weights / _GIB:.1f}, activations of {reserve.max_batch_tokens} tokens "
        f"{fullest.activations / _GIB:.1f}"
    )
    if num_blocks < 1:
        what = "no room for a KV block"
    else:
        holds = num_blocks * reserve.block_size * layout.kvp
        what = f"the rest holds {holds:,} tokens on {layout.kvp} KVP rank(s), not {num_tokens:,}"
    raise ConfigError(
        f"{where} does not fit: {uses}; {what}. {_suggest_cluster(shape, hardware, layout, reserve, num_tokens)}"
    )


def _fits(
    shape: ModelShape, hardware: Hardware, layout: ParallelLayout, reserve: MemoryBudget, num_tokens: int
) -> bool:
    num_blocks = min(
        stage_footprint(shape, hardware, layout, stage, reserve).num_blocks
        for stage in (0, layout.spp - 1)  # those between have no more layers than the first, and nothing else
    )
    return num_blocks >= 1 and num_blocks * reserve.block_size * layout.kvp >= num_tokens


def _suggest_cluster(
    shape: ModelShape, hardware: Hardware, layout: ParallelLayout, reserve: MemoryBudget, num_tokens: int
) -> str:
    """The fewest devices that hold it, with as many KVP ranks as asked for if they are there; else a larger cluster."""
    candidates = []
    degrees = [1 << i for i in range(_MAX_DEGREE.bit_length())]
    for tp, spp, kvp in product(degrees, degrees, sorted({*degrees, layout.kvp})):
        if tp > max(hardware.devices_per_node, layout.tp) or spp > shape.num_layers:
            continue
        other = ParallelLayout(tp=tp, spp=spp, kvp=kvp, dp=layout.dp)
        if _undivided(shape, tp, spp) or not _fits(shape, hardware, other, reserve, num_tokens):
            continue
        is_larger, num_given_up = other.world_size > hardware.num_devices, max(0, layout.kvp - kvp)
        num_changed = (tp != layout.tp) + (spp != layout.spp) + (kvp != layout.kvp)
        candidates.append((is_larger, num_given_up, other.world_size, num_changed, spp, kvp, other))
    if not candidates:
        return "No layout of such devices holds it; take a smaller model or larger devices"
    is_larger, *_, best = min(candidates, key=lambda candidate: candidate[:-1])
    size = f", on {best.world_size} devices instead of the {hardware.num_devices} there are" if is_larger else ""
    return f"parallel.tp={best.tp} parallel.spp={best.spp} parallel.kvp={best.kvp} would fit{size}"
