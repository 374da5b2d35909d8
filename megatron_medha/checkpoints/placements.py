"""Where each tensor of a Hugging Face checkpoint goes: a view into one parameter of a Megatron model.

A rank has only the layers of its stage, and of those only the rows or columns of its tensor-parallel share. Megatron
keeps Q, K and V in one matrix, group by group (the queries of a group, its key, its value), and the MLP's gate above
its up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_medha.checkpoints.weight_checks import StoredHeader, is_finite, refuse_misfits
from megatron_medha.models.model_config import ModelConfig

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"  # within a layer of ours
_OUR_LM_HEAD = "output_layer.weight"
_OUR_EMBEDDING = "embedding.word_embeddings.weight"


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
class Placement:
    """Where one tensor of the checkpoint goes."""

    shape: tuple[int, ...]            # of the whole tensor in the file
    split_dim: int | None             # the dimension tensor-parallel ranks share out; None: every rank has it all
    parameter: str | None             # name in this rank's model; None: it is on other stages only
    view: Callable[[Tensor], Tensor]  # the part of this rank's parameter that it fills

    def part(self, whole: Any, share: ModelSlice) -> Any:
        """This rank's part of the tensor, or of what can be sliced like it."""
        if self.split_dim is None or share.tp == 1:
            return whole[:]
        rows = share.rows(self.shape[self.split_dim])
        return whole[rows] if self.split_dim == 0 else whole[:, rows]

    def fill(self, parameters: Mapping[str, Tensor], part: Tensor) -> bool:
        """Copy the part to where it goes; whether all of it are numbers."""
        assert self.parameter is not None
        destination = self.view(parameters[self.parameter])
        destination.copy_(part.reshape(destination.shape))
        return is_finite(destination)


def model_slice_of(model: Any) -> ModelSlice:
    """The part of the whole that a GPTModel is."""
    layers = model.decoder.layers
    tp = model.pg_collection.tp
    return ModelSlice(layers[0].layer_number - 1, len(layers), tp.rank(), tp.size())


def placements(config: ModelConfig, parameter_names: set[str], share: ModelSlice) -> dict[str, Placement]:
    """Every tensor a Hugging Face checkpoint of this architecture holds, by key, and where it goes.

    parameter_names tells Megatron's own layers from Transformer Engine's, which keep a norm in the linear after it,
    and which of the layers outside of the decoder this rank has.
    """
    hidden, ffn, head_dim = config.hidden_size, config.ffn_hidden_size, config.head_dim
    num_groups, ffn_local = config.num_kv_heads // share.tp, ffn // share.tp
    q_rows = config.num_heads // config.num_kv_heads * head_dim  # of one group
    group_rows = q_rows + 2 * head_dim
    vocab = config.vocab_size
    vocab_rows = share.rows(vocab)
    num_vocab_rows = vocab_rows.stop - vocab_rows.start

    def group_part(first: int, last: int) -> Callable[[Tensor], Tensor]:
        return lambda parameter: parameter.unflatten(0, (num_groups, group_rows))[:, first:last]

    def whole(parameter: Tensor) -> Tensor:
        return parameter

    def ids(parameter: Tensor) -> Tensor:
        return parameter[:num_vocab_rows]

    def first_named(*names: str) -> str | None:
        return next((name for name in names if name in parameter_names), None)

    # Tied embeddings are on the first stage and, as the output layer, on the last one.
    embedding_names = [_OUR_EMBEDDING, _OUR_LM_HEAD] if config.has_tied_embeddings else [_OUR_EMBEDDING]
    found = {
        EMBEDDING: Placement((vocab, hidden), 0, first_named(*embedding_names), ids),
        "model.norm.weight": Placement((hidden,), None, first_named("decoder.final_layernorm.weight"), whole),
    }
    if not config.has_tied_embeddings:
        found[LM_HEAD] = Placement((vocab, hidden), 0, first_named(_OUR_LM_HEAD), ids)
    qkv_parts = {
        "q": (config.num_heads * head_dim, group_part(0, q_rows)),
        "k": (config.num_kv_heads * head_dim, group_part(q_rows, q_rows + head_dim)),
        "v": (config.num_kv_heads * head_dim, group_part(q_rows + head_dim, group_rows)),
    }
    # Of every layer, by key: the whole tensor's shape, its shared-out dimension, our name or names, the view.
    layer_tensors: dict[str, tuple[tuple[int, ...], int | None, tuple[str, ...], Callable[[Tensor], Tensor]]] = {
        "self_attn.o_proj.weight": (
            (hidden, config.num_heads * head_dim), 1, ("self_attention.linear_proj.weight",), whole
        ),
        "mlp.gate_proj.weight": ((ffn, hidden), 0, (f"{_FC1}.weight",), lambda p: p[:ffn_local]),
        "mlp.up_proj.weight": ((ffn, hidden), 0, (f"{_FC1}.weight",), lambda p: p[ffn_local:]),
        "mlp.down_proj.weight": ((hidden, ffn), 1, ("mlp.linear_fc2.weight",), whole),
        "input_layernorm.weight": ((hidden,), None, ("input_layernorm.weight", f"{_QKV}.layer_norm_weight"), whole),
        "post_attention_layernorm.weight": (
            (hidden,), None, ("pre_mlp_layernorm.weight", f"{_FC1}.layer_norm_weight"), whole
        ),
    }  # fmt: skip
    for part, (rows, view) in qkv_parts.items():
        layer_tensors[f"self_attn.{part}_proj.weight"] = ((rows, hidden), 0, (f"{_QKV}.weight",), view)
        if config.has_qkv_bias:
            layer_tensors[f"self_attn.{part}_proj.bias"] = ((rows,), 0, (f"{_QKV}.bias",), view)
        if config.has_qk_norm and part != "v":
            norm = f"self_attention.{part}_layernorm.weight"
            layer_tensors[f"self_attn.{part}_norm.weight"] = ((head_dim,), None, (norm,), whole)
    for layer in range(config.num_layers):
        ours = f"decoder.layers.{layer - share.first_layer}"
        is_here = 0 <= layer - share.first_layer < share.num_layers
        for key, (shape, split_dim, names, view) in layer_tensors.items():
            parameter = first_named(*(f"{ours}.{name}" for name in names)) if is_here else None
            found[f"model.layers.{layer}.{key}"] = Placement(shape, split_dim, parameter, view)
    return found


def checked_placements(
    model: Any, config: ModelConfig, headers: Mapping[str, StoredHeader], where: Path, source: str
) -> dict[str, Placement]:
    """placements() of this rank's model, checked against the stored tensors; arguments as those of refuse_misfits."""
    parameters = {name for name, _ in model.named_parameters()}
    expected = placements(config, parameters, model_slice_of(model))
    if config.has_tied_embeddings and LM_HEAD in headers and EMBEDDING not in headers:
        # Tied embeddings may be stored under the head's name alone, as by safetensors' save_model.
        expected = {LM_HEAD if key == EMBEDDING else key: placement for key, placement in expected.items()}
    unfilled = parameters - {placement.parameter for placement in expected.values()}
    assert not unfilled, f"no checkpoint tensor fills {sorted(unfilled)}"
    shapes = {key: placement.shape for key, placement in expected.items()}
    refuse_misfits(shapes, headers, where, source, is_ignored=lambda key: _may_be_ignored(key, config))
    return expected


def _may_be_ignored(key: str, config: ModelConfig) -> bool:
    """Tables that old checkpoints keep though they follow from the config, and a copy of tied embeddings."""
    return key.endswith(".rotary_emb.inv_freq") or (key == LM_HEAD and config.has_tied_embeddings)


def zero_padding_rows(parameters: Mapping[str, Tensor], config: ModelConfig, share: ModelSlice) -> int:
    """Rows that only fill up the vocabulary, which nothing else sets; returns how many others this rank has."""
    num_ids = len(range(config.vocab_size)[share.rows(config.vocab_size)])
    for name in {_OUR_EMBEDDING, _OUR_LM_HEAD} & set(parameters):
        parameters[name][num_ids:].zero_()
    return num_ids
