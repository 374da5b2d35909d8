"""Mixtral: a Mistral with eight experts in every layer."""

from __future__ import annotations

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.expert_rows import EXPERT_READS, OURS, expert_rows
from megatron_medha.models.families.family import Family, Rule, TensorRow, all_layers
from megatron_medha.models.families.llama import EMBEDDING_ROWS, HEAD_ROWS, NORM_ROWS, OUTPUT_ROWS, qkv_rows
from megatron_medha.safe_files.json_fields import JsonFields

_LAYER = "model.layers.{layer}"
_ROWS = (
    *EMBEDDING_ROWS,
    *HEAD_ROWS,
    *NORM_ROWS,
    *qkv_rows(),
    *OUTPUT_ROWS,
    TensorRow(f"{_LAYER}.block_sparse_moe.gate.weight", f"{OURS}.router.weight"),
    TensorRow(f"{_LAYER}.mlp.gate.weight", f"{OURS}.router.weight"),
    *expert_rows(f"{_LAYER}.block_sparse_moe", ("w1", "w3", "w2")),
    *expert_rows(f"{_LAYER}.mlp", ("w1", "w3", "w2")),
)


def _experts(config: JsonFields) -> Experts:
    return Experts(
        num_experts=config.integer("num_local_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        ffn_hidden_size=config.integer("intermediate_size"),
    )


MIXTRAL = Family(
    model_type="mixtral",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    reads=f"{EXPERT_READS} num_local_experts router_jitter_noise",  # noise in training only
    rules={"norm_topk_prob": Rule((None, True), "the weights of a token's experts add up to one")},
    traits=lambda config: {"experts": _experts(config)},
    tensors=lambda _: _ROWS,
    windowed_layers=all_layers,
)  # fmt: skip
