"""Where each tensor of a Hugging Face checkpoint goes: boxes of it, and the views of this rank's parameters they fill.

Which tensor belongs to which parameter is the family's table (models/families). Which part of a parameter a rank has
is Megatron's own description of it (sharded_parts), for any layout, expert and kind of layer. Megatron keeps Q, K and V
in one matrix, group by group (the queries of a group, its key, its value), and the MLP's gate above its up projection.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_medha.checkpoints.weight_checks import StoredHeader, is_finite, refuse_misfits
from megatron_medha.models.families.family import TensorRow
from megatron_medha.models.model_config import ModelConfig

EMBEDDING_NAME, HEAD_NAME = "embedding.word_embeddings.weight", "output_layer.weight"

Box = tuple[slice, ...]

# Megatron's names of a norm where Transformer Engine fuses it with the linear layer after it; also those of others.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mlp.experts.experts.": "mlp.experts.",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class ModelSlice(NamedTuple):
    """Which part of the model a rank holds."""

    first_layer: int  # of the whole model's, on its stage
    num_layers: int
    tp_rank: int
    tp: int

    def rows(self, size: int) -> slice:
        """This rank's part of a dimension that tensor-parallel ranks share out; the last ranks' may be shorter."""
        each = -(-size // self.tp)
        return slice(min(each * self.tp_rank, size), min(each * (self.tp_rank + 1), size))


@dataclass(frozen=True, slots=True)
class Fill:
    """A box of a stored tensor, and the view of a parameter that it fills."""

    box: Box
    step: int         # of every so many rows of the box one is taken
    is_stacked: bool  # the box's first dimension is one expert
    view: Tensor
    row: TensorRow
    head_dims: tuple[int, int] | None = None  # of heads in rotary pairs: their numbers, and how many of them turn

    def copy(self, stored: Tensor) -> bool:
        """Fill the view with what the box holds; whether all of it are numbers."""
        if self.is_stacked:
            stored = stored[0]
        if self.row.is_transposed and stored.dim() == 2:
            stored = stored.t()
        stored = stored[:: self.step]
        if self.head_dims is not None:
            stored = _with_halves(stored, *self.head_dims)
        self.view.copy_(stored.reshape(self.view.shape))
        if self.row.scale != 1.0:
            self.view.mul_(self.row.scale)
        return is_finite(self.view)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor of the checkpoint goes."""

    shape: tuple[int, ...]  # of the whole tensor in the file
    fills: tuple[Fill, ...]

    def fill(self, read: Callable[[Box], Tensor]) -> bool:
        """Copy what is read of the tensor to where it goes; whether all of it are numbers."""
        return all(fill.copy(read(fill.box)) for fill in self.fills)


def model_slice_of(model: Any) -> ModelSlice:
    """The part of the whole that a GPTModel is."""
    layers = model.decoder.layers
    tp = model.pg_collection.tp
    return ModelSlice(layers[0].layer_number - 1, len(layers), tp.rank(), tp.size())


def checked_placements(
    rows: Sequence[TensorRow],
    parts: Sequence[ShardedTensor],
    config: ModelConfig,
    headers: Mapping[str, StoredHeader],
    where: Path,
    source: str,
    unread_keys: str = "",
) -> dict[str, Placement]:
    """Where each stored tensor goes that this rank needs, by key; checked against what is stored.

    rows: the family's. parts: this rank's, layer by layer, as sharded_parts gives them. unread_keys: a pattern
    of what is stored and not needed. Other arguments as those of refuse_misfits.
    """
    rows = _with_stored_embedding(rows, config, headers)
    expected = placements(rows, parts, config, headers)
    names = {_named(part.key)[0] for part in parts}
    layers = {layer for part in parts if (layer := _named(part.key)[1]) is not None}

    def is_ignored(key: str) -> bool:
        is_unread = key.endswith(".rotary_emb.inv_freq") or re.fullmatch(unread_keys, key) is not None
        return is_unread or _is_of_others(key, rows, names, layers, config)

    refuse_misfits(
        {key: placement.shape for key, placement in expected.items()}, headers, where, source, is_ignored=is_ignored
    )
    return expected


def placements(
    rows: Sequence[TensorRow], parts: Sequence[ShardedTensor], config: ModelConfig, stored: Collection[str]
) -> dict[str, Placement]:
    """The tensors that fill these parts, by key; of rows for the same part the first that is stored."""
    rows_of: dict[str, list[TensorRow]] = defaultdict(list)
    for row in rows:
        rows_of[row.parameter].append(row)
    shapes: dict[str, tuple[int, ...]] = {}
    fills: dict[str, list[Fill]] = defaultdict(list)
    for part in parts:
        name, layer = _named(part.key)
        expert = part.global_offset[0] if part.prepend_axis_num else None
        candidates = [
            _Candidate(row, row.key.format(layer=layer, expert=expert), *pieces)
            for row in rows_of[name]
            if (pieces := _pieces(row, part, config))
        ]
        assert candidates, f"no checkpoint tensor fills {part.key}"
        for chosen in _chosen(candidates, stored):
            for region in chosen.regions:
                shapes[chosen.key], fill = _placed(chosen, part, region, config)
                fills[chosen.key].append(fill)
    return {key: Placement(shape, tuple(fills[key])) for key, shape in shapes.items()}


class _Region(NamedTuple):
    """Rows of a stored matrix, and the view that they fill."""

    rows: slice
    view: Tensor
    is_turned: bool = False  # queries or keys


class _Candidate(NamedTuple):
    """A tensor that may be stored, and which of its rows go where."""

    row: TensorRow
    key: str
    whole_rows: int  # of the stored matrix
    regions: list[_Region]


_Pieces = tuple[int, list[_Region]]


def _pieces(row: TensorRow, part: ShardedTensor, config: ModelConfig) -> _Pieces | None:
    """What of that row's tensor belongs to this part of a parameter; None if nothing does."""
    first_dim = part.prepend_axis_num
    data, num_rows, first = part.data, part.global_shape[first_dim], part.global_offset[first_dim]
    has_gate = config.has_gate and ".linear_fc1." in row.parameter
    if row.part == "all" or (row.part == "up" and not has_gate):
        if part.allow_shape_mismatch:  # a vocabulary with padding
            num_rows = config.vocab_size
            data = data[: max(num_rows - first, 0)]
        return num_rows, [_Region(slice(first, first + len(data)), data)]
    if row.part in ("q", "k", "v", "qkv"):
        return _qkv_pieces(row.part, part, config)
    half = num_rows // 2
    is_gate = first < half
    start = first if is_gate else first - half
    if row.part == "paired_gate_up":
        return num_rows, [_Region(slice(2 * start + (not is_gate), 2 * (start + len(data)), 2), data)]
    if row.part == ("gate" if is_gate else "up") and has_gate:
        return half, [_Region(slice(start, start + len(data)), data)]
    return None


def _qkv_pieces(kind: str, part: ShardedTensor, config: ModelConfig) -> _Pieces:
    first_dim = part.prepend_axis_num
    group_rows = part.global_shape[first_dim] // config.num_kv_heads
    first_group = part.global_offset[first_dim] // group_rows
    groups = part.data.unflatten(0, (-1, group_rows))
    q_rows = group_rows - 2 * config.head_dim
    ends = {"q": (0, q_rows), "k": (q_rows, group_rows - config.head_dim), "v": (group_rows - config.head_dim, None)}
    kinds = ("q", "k", "v") if kind == "qkv" else (kind,)
    regions, before = [], 0
    for each in kinds:
        view = groups[:, slice(*ends[each])]
        size = view.shape[1]
        start = before + first_group * size
        regions.append(_Region(slice(start, start + len(groups) * size), view, is_turned=each != "v"))
        before += config.num_kv_heads * size
    return before, regions


def _chosen(candidates: list[_Candidate], stored: Collection[str]) -> list[_Candidate]:
    """Those that fill the parameter together: of several ways the one of which the most is stored."""
    ways: list[list[_Candidate]] = []
    for each in candidates:
        kind = each.row.part
        is_one_of_three = kind in ("q", "k", "v") and ways and ways[-1][0].row.part in ("q", "k", "v")
        if is_one_of_three and kind not in (other.row.part for other in ways[-1]):
            ways[-1].append(each)
        else:
            ways.append([each])
    return max(ways, key=lambda way: sum(each.key in stored for each in way) / len(way))


def _placed(
    chosen: _Candidate, part: ShardedTensor, region: _Region, config: ModelConfig
) -> tuple[tuple[int, ...], Fill]:
    """The shape of the whole stored tensor, and where this region of it goes."""
    row, num_before = chosen.row, part.prepend_axis_num
    shape = [chosen.whole_rows, *part.global_shape[num_before + 1 :]]
    box = [slice(region.rows.start, region.rows.stop)]
    for size, first in zip(part.data.shape[1:], part.global_offset[num_before + 1 :], strict=True):
        box.append(slice(first, first + size))
    if row.is_transposed and len(shape) == 2:
        shape.reverse()
        box.reverse()
    is_stacked = num_before > 0 and "{expert}" not in row.key
    if is_stacked:
        shape.insert(0, part.global_shape[0])
        box.insert(0, slice(part.global_offset[0], part.global_offset[0] + 1))
    head_dims = (config.head_dim, config.num_rotated) if row.has_rotary_pairs and region.is_turned else None
    return tuple(shape), Fill(tuple(box), region.rows.step or 1, is_stacked, region.view, row, head_dims)


def _with_halves(stored: Tensor, head_dim: int, num_rotated: int) -> Tensor:
    """Rows of heads in which neighbours turn together, in the order in which those half the rotated part apart do."""
    heads = stored.unflatten(0, (-1, head_dim))
    turned = heads[:, :num_rotated].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, heads[:, num_rotated:]), dim=1)


def _named(key: str) -> tuple[str, int | None]:
    """A parameter's name as the tables have it, and the number of its layer."""
    for theirs, ours in FUSED_NORMS.items():
        key = key.replace(theirs, ours)
    match = _LAYER.match(key)
    return (key, None) if match is None else (_LAYER.sub("decoder.layers.{layer}.", key, count=1), int(match[1]))


def _with_stored_embedding(
    rows: Sequence[TensorRow], config: ModelConfig, stored: Collection[str]
) -> Sequence[TensorRow]:
    """Tied embeddings may be stored under the head's name alone, as by safetensors' save_model."""
    if not config.has_tied_embeddings:
        return rows
    heads = [row._replace(parameter=EMBEDDING_NAME) for row in rows if row.parameter == HEAD_NAME]
    return [*rows, *heads]


def _is_of_others(
    key: str, rows: Sequence[TensorRow], names: set[str], layers: set[int], config: ModelConfig
) -> bool:
    """Whether a tensor that this rank does not need is one of other stages, or a copy of tied embeddings."""
    for row, layer in _rows_like(key, rows):
        if layer is not None:
            if layer < config.num_layers and layer not in layers:
                return True
        elif row.parameter == HEAD_NAME and config.has_tied_embeddings:
            return True
        elif row.parameter.startswith("embedding."):
            if EMBEDDING_NAME not in names:
                return True
        elif "decoder.final_layernorm.weight" not in names:
            return True
    return False


def _rows_like(key: str, rows: Sequence[TensorRow]) -> Iterator[tuple[TensorRow, int | None]]:
    """The rows that a stored key may be one of, each with the number of the layer."""
    for row in rows:
        pattern = re.escape(row.key).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"\d+")
        if match := re.fullmatch(pattern, key):
            layer = match.groupdict().get("layer")
            yield row, None if layer is None else int(layer)


def zero_padding_rows(parameters: Mapping[str, Tensor], config: ModelConfig, share: ModelSlice) -> int:
    """Rows that only fill up the vocabulary, which nothing else sets; returns how many others this rank has."""
    num_ids = len(range(config.vocab_size)[share.rows(config.vocab_size)])
    for name in {EMBEDDING_NAME, HEAD_NAME} & set(parameters):
        parameters[name][num_ids:].zero_()
    return num_ids
