"""The model of a GGUF file: its metadata as the fields of config.json that they stand for, and its tensors' names.

Llama (Mistral and Mixtral too, which llama.cpp calls so), Qwen 2 and 3, and their mixtures of experts. What llama.cpp's
converters write is read; a set field that is not known here is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.models.families.expert_rows import OURS
from megatron_medha.models.families.family import Family, TensorRow
from megatron_medha.models.families.llama import LLAMA, LLAMA_ROWS, PAIRED_ROWS
from megatron_medha.models.families.mixtral import MIXTRAL
from megatron_medha.models.families.qwen import QWEN2, QWEN3
from megatron_medha.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from megatron_medha.models.hf_config import config_of_family
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import listed, open_regular, shown
from megatron_medha.safe_files.gguf_file import GGUFFile
from megatron_medha.safe_files.json_fields import JsonFields

# In one stack for all experts of a layer, or, in older files, one by one.
_EXPERT_ROWS = (
    TensorRow("blk.{layer}.ffn_gate_inp.weight", f"{OURS}.router.weight"),
    TensorRow("blk.{layer}.ffn_gate_exps.weight", f"{OURS}.experts.linear_fc1.weight", "gate"),
    TensorRow("blk.{layer}.ffn_up_exps.weight", f"{OURS}.experts.linear_fc1.weight", "up"),
    TensorRow("blk.{layer}.ffn_down_exps.weight", f"{OURS}.experts.linear_fc2.weight"),
    TensorRow("blk.{layer}.ffn_gate.{expert}.weight", f"{OURS}.experts.linear_fc1.weight", "gate"),
    TensorRow("blk.{layer}.ffn_up.{expert}.weight", f"{OURS}.experts.linear_fc1.weight", "up"),
    TensorRow("blk.{layer}.ffn_down.{expert}.weight", f"{OURS}.experts.linear_fc2.weight"),
    TensorRow("blk.{layer}.ffn_gate_shexp.weight", f"{OURS}.shared_experts.linear_fc1.weight", "gate"),
    TensorRow("blk.{layer}.ffn_up_shexp.weight", f"{OURS}.shared_experts.linear_fc1.weight", "up"),
    TensorRow("blk.{layer}.ffn_down_shexp.weight", f"{OURS}.shared_experts.linear_fc2.weight"),
    TensorRow("blk.{layer}.ffn_gate_inp_shexp.weight", f"{OURS}.shared_experts.gate_weight"),
)
# llama.cpp turns neighbouring numbers of Llama's heads; its converter reorders queries and keys for that.
_FAMILIES: Mapping[str, tuple[Family, Sequence[TensorRow]]] = {
    "llama": (LLAMA, PAIRED_ROWS),
    "qwen2": (QWEN2, LLAMA_ROWS),
    "qwen3": (QWEN3, LLAMA_ROWS),
    "qwen2moe": (QWEN2_MOE, LLAMA_ROWS),
    "qwen3moe": (QWEN3_MOE, LLAMA_ROWS),
}
# What llama.cpp's code of a mixture has, and no field says: whether the weights of a token's experts add up to one.
_NORMS_WEIGHTS = {"llama": True, "qwen2moe": False, "qwen3moe": True}
ROPE_FACTORS = "rope_freqs.weight"
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_CHECKED = frozenset(
    ("vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.factor")
    + ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal")
)
_NAMES = (
    ("model.layers.{layer}.self_attn.q_norm", "blk.{layer}.attn_q_norm"),
    ("model.layers.{layer}.self_attn.k_norm", "blk.{layer}.attn_k_norm"),
    ("model.layers.{layer}.self_attn.q_proj", "blk.{layer}.attn_q"),
    ("model.layers.{layer}.self_attn.k_proj", "blk.{layer}.attn_k"),
    ("model.layers.{layer}.self_attn.v_proj", "blk.{layer}.attn_v"),
    ("model.layers.{layer}.self_attn.o_proj", "blk.{layer}.attn_output"),
    ("model.layers.{layer}.input_layernorm", "blk.{layer}.attn_norm"),
    ("model.layers.{layer}.post_attention_layernorm", "blk.{layer}.ffn_norm"),
    ("model.layers.{layer}.mlp.gate_proj", "blk.{layer}.ffn_gate"),
    ("model.layers.{layer}.mlp.up_proj", "blk.{layer}.ffn_up"),
    ("model.layers.{layer}.mlp.down_proj", "blk.{layer}.ffn_down"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
)
# Of Llama 3.1's scaling of its rotary frequencies, the same in all its sizes but for the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_MAX_FACTORS = 4096


def gguf_model_config(file: GGUFFile, dtype: str) -> ModelConfig:
    """The architecture. dtype: of the weights, once they are floats.

    Raises CheckpointError for metadata that are missing or of the wrong type, UnsupportedModelError with the reasons
    for a model that is not served.
    """
    family, _ = _family(file)
    fields = _fields(file) | {"dtype": dtype}
    config = JsonFields(file.path, {**family.defaults, **fields})
    found = config_of_family(family, config, file.path.stem, lambda: _end_ids(file))
    rotated = file.metadata.get(f"{_architecture(file)}.rope.dimension_count", found.head_dim)
    if rotated != found.head_dim:
        raise UnsupportedModelError(
            f"{file.path}: rope.dimension_count={shown(rotated)} is not supported: all of head_dim={found.head_dim} is"
        )
    return found


def gguf_tensor_rows(file: GGUFFile) -> tuple[TensorRow, ...]:
    """The tensors of such a file, by llama.cpp's names."""
    rows = tuple(row._replace(key=_name(row.key)) for row in _family(file)[1])
    return (*rows, *_EXPERT_ROWS) if _has_experts(file) else rows


def _has_experts(file: GGUFFile) -> bool:
    return bool(file.metadata.get(f"{_architecture(file)}.expert_count"))


def _name(key: str) -> str:
    return next(key.replace(theirs, ours, 1) for theirs, ours in _NAMES if key.startswith(f"{theirs}."))


def _architecture(file: GGUFFile) -> str:
    return str(file.metadata.get("general.architecture"))


def _family(file: GGUFFile) -> tuple[Family, Sequence[TensorRow]]:
    architecture = _architecture(file)
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"{file.path}: general.architecture={shown(architecture)} is not supported: one of {', '.join(_FAMILIES)} "
            "is. Take the safetensors of the model that the file was made from"
        )
    family, rows = _FAMILIES[architecture]
    if _has_experts(file) != (architecture.endswith("moe")):
        if architecture != "llama":
            key = f"{architecture}.expert_count"
            raise UnsupportedModelError(f"{file.path}: {key}={shown(file.metadata.get(key))} of a {architecture}")
        return MIXTRAL, rows
    return family, rows


def _fields(file: GGUFFile) -> dict[str, Any]:
    prefix = f"{_architecture(file)}."
    stated = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    unknown = [
        f"{file.path}: {prefix}{key[:80]}={shown(value)} is not supported: this field is not known here, and may "
        "change what the model computes"
        for key, value in stated.items()
        if value and key not in _FIELDS and key not in _CHECKED
    ]
    if stated.get("attention.causal") is False:
        unknown.append(f"{file.path}: {prefix}attention.causal=False is not supported: it generates no text")
    if stated.get("attention.value_length") not in (None, stated.get("attention.key_length")):
        unknown.append(f"{file.path}: {prefix}attention.value_length must be attention.key_length")
    if unknown:
        raise UnsupportedModelError(listed(unknown))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    fields = {_FIELDS[key]: value for key, value in stated.items() if key in _FIELDS}
    if _has_experts(file):
        fields["norm_topk_prob"] = _NORMS_WEIGHTS[_architecture(file)]
        if _architecture(file) == "llama":
            fields["num_local_experts"] = fields.pop("num_experts")
    fields = {key: value for key, value in fields.items() if value or "expert" not in key}  # 0 is written for none
    if fields.get("sliding_window"):
        fields["use_sliding_window"] = True
    fields.setdefault("rope_theta", 10000.0)
    fields |= {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in file.tensors}
    if (scaling := _rope_scaling(file, stated, fields)) is not None:
        fields["rope_scaling"] = scaling
    return fields


def _rope_scaling(file: GGUFFile, stated: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = stated.get("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, float(fields["rope_theta"]))
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{file.path}: rope.scaling.type={shown(kind)} is not supported: linear, yarn are")
    scaling = {"rope_type": kind, "factor": stated.get("rope.scaling.factor")}
    if (original := stated.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(file: GGUFFile, theta: float) -> dict[str, Any]:
    """Llama 3.1's, recognised by what llama.cpp writes of it: a divisor for each frequency."""
    tensor = file.tensors[ROPE_FACTORS]
    count = math.prod(tensor.shape)
    if tensor.type_id != 0 or not 0 < count <= _MAX_FACTORS or tensor.start + 4 * count > file.num_bytes:
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS} must hold a 32-bit number for each frequency")
    with open_regular(file.path) as content:
        content.seek(tensor.start)
        divisors = struct.unpack(f"<{count}f", content.read(4 * count))
    factor = float(round(max(divisors)))
    for place, divisor in enumerate(divisors):
        per_turn = 2 * math.pi * theta ** (place / count)  # tokens
        turns = _LLAMA3["original_max_position_embeddings"] / per_turn
        low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        if factor < 1 or not math.isclose(divisor, 1 / ((1 - share) / factor + share), rel_tol=1e-3):
            raise UnsupportedModelError(
                f"{file.path}: {ROPE_FACTORS} is not supported: its divisors are not those of Llama 3.1"
            )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _end_ids(file: GGUFFile) -> tuple[int, ...]:
    """Tokens that end an output: of a text, of a turn."""
    found = (file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    num_ids = file.tensors["token_embd.weight"].shape[0]
    return tuple(dict.fromkeys(each for each in found if isinstance(each, int) and 0 <= each < num_ids))
