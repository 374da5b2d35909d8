"""Streaming the safetensors of a Hugging Face checkpoint into a Megatron model's parameters. Its config is elsewhere.

Every tensor of the files has one place: a view into one parameter of the model. A rank reads only the layers of its
stage, and of those only the rows or columns of its tensor-parallel share. Megatron keeps Q, K and V in one
matrix, group by group (the queries of a group, its key, its value), and the MLP's gate above its up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_medha.checkpoints.weight_checks import is_finite, refuse_non_finite
from megatron_medha.core.errors import CheckpointError
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import listed, open_regular, path_inside, read_bytes

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_LM_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"  # within a layer of ours
_OUR_LM_HEAD = "output_layer.weight"
_OUR_EMBEDDING = "embedding.word_embeddings.weight"
_DTYPES = ("F64", "F32", "BF16", "F16")
_MAX_INDEX_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 20  # 100 bytes a tensor

ReportProgress = Callable[[str, float], None]  # what is being done, and which fraction of it is: 0..1


class _Index(msgspec.Struct):
    """What is read of the index."""

    weight_map: dict[str, str]


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
        _EMBEDDING: Placement((vocab, hidden), 0, first_named(*embedding_names), ids),
        "model.norm.weight": Placement((hidden,), None, first_named("decoder.final_layernorm.weight"), whole),
    }
    if not config.has_tied_embeddings:
        found[_LM_HEAD] = Placement((vocab, hidden), 0, first_named(_OUR_LM_HEAD), ids)
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


@torch.no_grad()
def load_hf_weights(model: nn.Module, config: ModelConfig, directory: Path, progress: ReportProgress) -> None:
    """Fill the model's parameters from the safetensors in the directory, one tensor at a time.

    All headers are checked first, so nothing is copied when a tensor is missing, surplus or of the wrong shape.
    Values are converted to the parameters' dtype and device. Raises CheckpointError naming file and key.
    """
    parameters = dict(model.named_parameters())
    share = model_slice_of(model)
    file_of = _files_by_key(directory)
    expected = with_tied_head(placements(config, set(parameters), share), file_of, config)
    unfilled = set(parameters) - {placement.parameter for placement in expected.values()}
    assert not unfilled, f"no checkpoint tensor fills {sorted(unfilled)}"
    _check_headers(expected, file_of, config, directory)
    num_ids = zero_padding_rows(parameters, config, share)
    wanted = {key: placement for key, placement in expected.items() if placement.parameter is not None}
    num_loaded = 0
    for path in sorted({file_of[key] for key in wanted}):
        not_finite = []
        with opened(path) as file:
            for key in (key for key in sorted(file.keys()) if key in wanted and file_of[key] == path):
                placement = wanted[key]
                assert placement.parameter is not None
                destination = placement.view(parameters[placement.parameter])
                destination.copy_(_part(file, key, placement, share).view(destination.shape))
                if not is_finite(destination):
                    not_finite.append(key)
                num_loaded += 1
                progress(f"weights from {path.name}", num_loaded / len(wanted))
        refuse_non_finite(path, not_finite)
    if config.has_tied_embeddings and _LM_HEAD in file_of and _EMBEDDING in wanted:
        tied = parameters[str(wanted[_EMBEDDING].parameter)]
        _check_tied_head(file_of[_LM_HEAD], expected[_EMBEDDING], share, tied[:num_ids])


def zero_padding_rows(parameters: Mapping[str, Tensor], config: ModelConfig, share: ModelSlice) -> int:
    """Rows that only fill up the vocabulary, which nothing else sets; returns how many others this rank has."""
    num_ids = len(range(config.vocab_size)[share.rows(config.vocab_size)])
    for name in {_OUR_EMBEDDING, _OUR_LM_HEAD} & set(parameters):
        parameters[name][num_ids:].zero_()
    return num_ids


def _part(file: Any, key: str, placement: Placement, share: ModelSlice) -> Tensor:
    """This rank's part of a tensor, the only one that is read from the disk."""
    if placement.split_dim is None or share.tp == 1:
        return file.get_tensor(key)
    rows = share.rows(placement.shape[placement.split_dim])
    part = file.get_slice(key)
    return part[rows] if placement.split_dim == 0 else part[:, rows]


def with_tied_head(
    expected: dict[str, Placement], keys: Collection[str], config: ModelConfig
) -> dict[str, Placement]:
    """The same, by the head's name where tied embeddings are stored under that alone, as by safetensors' save_model."""
    if config.has_tied_embeddings and _LM_HEAD in keys and _EMBEDDING not in keys:
        return {_LM_HEAD if key == _EMBEDDING else key: placement for key, placement in expected.items()}
    return expected


def hf_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, index or not; empty when it has none.

    Where two saves left a single file and an index of shards, the single file is taken, as by transformers.
    Raises CheckpointError when the index is needed and is broken or names a file that is not there.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file():
        with suppress(CheckpointError):
            paths = _indexed_files(index)
            if single in paths and all(path.is_file() for path in paths):
                return paths
        return [single]
    if index.is_file():
        paths = _indexed_files(index)
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, though {INDEX_NAME} names it")
        return paths
    # "consolidated" files hold the same weights again, in Mistral's own naming.
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_bytes(index, _MAX_INDEX_BYTES), type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of tensors: {error}") from error


def _indexed_files(index: Path) -> list[Path]:
    names = set(_weight_map(index).values())
    if not names:
        raise CheckpointError(f"{index}: weight_map is empty")
    return [path_inside(index.parent, name, index.name) for name in sorted(names)]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its header checked. Raises CheckpointError naming it when it is damaged."""
    try:
        with open_regular(path) as start:
            num_header_bytes = int.from_bytes(start.read(8) or b"", "little")
        if num_header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: its header takes {num_header_bytes} bytes; damaged")
        # Reading, too, may fail: a file on a network mount can be cut short after it was opened.
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors, damaged or incomplete: {error}") from error


def _files_by_key(directory: Path) -> dict[str, Path]:
    """Where each tensor is. Raises CheckpointError if one is in two files that differ in it."""
    file_of: dict[str, Path] = {}
    for path in hf_weight_files(directory):
        with opened(path) as file:
            for key in sorted(file.keys()):
                if key not in file_of:
                    file_of[key] = path
                elif not _is_same_tensor(file, file_of[key], key):
                    raise CheckpointError(f"{path}: tensor {key} is in {file_of[key].name} too, with other values")
    return file_of


def _is_same_tensor(file: Any, other: Path, key: str) -> bool:
    with opened(other) as second:
        is_alike = file.get_slice(key).get_shape() == second.get_slice(key).get_shape()
        return is_alike and torch.equal(file.get_tensor(key), second.get_tensor(key))


def num_stored_elements(directory: Path) -> int:
    """Of all tensors in the checkpoint's files together, from their headers."""
    num_elements = 0
    for path in hf_weight_files(directory):
        with opened(path) as file:
            num_elements += sum(prod(file.get_slice(key).get_shape()) for key in sorted(file.keys()))
    return num_elements


def _check_headers(
    expected: Mapping[str, Placement], file_of: Mapping[str, Path], config: ModelConfig, directory: Path
) -> None:
    """Raise one CheckpointError that names every (or the first few) tensor at fault."""
    problems = [f"{_where_expected(directory)}: tensor {key} is missing" for key in expected if key not in file_of]
    for path in sorted(set(file_of.values())):
        with opened(path) as file:
            for key in (key for key in sorted(file.keys()) if file_of[key] == path):
                if key not in expected:
                    if not may_be_ignored(key, config):
                        problems.append(f"{path}: tensor {key} is not part of this model")
                    continue
                header = file.get_slice(key)
                if tuple(header.get_shape()) != expected[key].shape:
                    shape = list(expected[key].shape)
                    problems.append(f"{path}: tensor {key} has shape {header.get_shape()}, config.json says {shape}")
                elif header.get_dtype() not in _DTYPES:
                    problems.append(
                        f"{path}: tensor {key} has dtype {header.get_dtype()}; readable are {', '.join(_DTYPES)}"
                    )
    if problems:
        raise CheckpointError(listed(problems))


def _where_expected(directory: Path) -> Path:
    index = directory / INDEX_NAME
    if index.is_file():
        return index
    paths = hf_weight_files(directory)
    return paths[0] if len(paths) == 1 else directory


def may_be_ignored(key: str, config: ModelConfig) -> bool:
    """Tables that old checkpoints keep though they follow from the config, and a copy of tied embeddings."""
    return key.endswith(".rotary_emb.inv_freq") or (key == _LM_HEAD and config.has_tied_embeddings)


def _check_tied_head(path: Path, placement: Placement, share: ModelSlice, embedding_VC: Tensor) -> None:
    with opened(path) as file:
        head_VC = _part(file, _LM_HEAD, placement, share)
    if not torch.equal(head_VC.to(embedding_VC.device, embedding_VC.dtype), embedding_VC):
        raise CheckpointError(f"{path}: tensor {_LM_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings is true")
