"""How most families name the tensors of experts: of each one by one, or of all of a layer in one stack."""

from __future__ import annotations

from typing import Any

from megatron_medha.core.model_spec import Experts
from megatron_medha.models.families.family import Rule, TensorRow
from megatron_medha.models.families.llama import rows_of_weights_and_biases
from megatron_medha.safe_files.json_fields import JsonFields

OURS = "decoder.layers.{layer}.mlp"
# Fields of training, whose losses spread tokens over experts.
EXPERT_READS = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob output_router_logits " + (
    "router_aux_loss_coef"
)
NORMED_WEIGHTS = Rule((True,), "the weights of a token's experts must add up to one")


def expert_rows(
    layer: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[TensorRow, ...]:
    """Of experts whose tensors are below `layer`.experts; names: of one's gate, up and down projection."""
    gate, up, down = names
    fc1, fc2 = f"{OURS}.experts.linear_fc1.weight", f"{OURS}.experts.linear_fc2.weight"
    return (
        TensorRow(f"{layer}.experts.{{expert}}.{gate}.weight", fc1, "gate"),
        TensorRow(f"{layer}.experts.{{expert}}.{up}.weight", fc1, "up"),
        TensorRow(f"{layer}.experts.{{expert}}.{down}.weight", fc2),
        TensorRow(f"{layer}.experts.gate_up_proj", fc1),
        TensorRow(f"{layer}.experts.down_proj", fc2),
    )


def shared_expert_rows(expert: str) -> tuple[TensorRow, ...]:
    """Of the expert that every token goes through."""
    fc1, fc2 = f"{OURS}.shared_experts.linear_fc1", f"{OURS}.shared_experts.linear_fc2"
    return (
        *rows_of_weights_and_biases(f"{expert}.gate_proj", fc1, "gate"),
        *rows_of_weights_and_biases(f"{expert}.up_proj", fc1, "up"),
        *rows_of_weights_and_biases(f"{expert}.down_proj", fc2),
    )


def dense_first_layers(config: JsonFields) -> tuple[bool, ...]:
    """Which layers have experts where the first ones do not: first_k_dense_replace says how many."""
    num_dense, num_layers = config.fields.get("first_k_dense_replace") or 0, config.integer("num_hidden_layers")
    if not isinstance(num_dense, int) or isinstance(num_dense, bool) or not 0 <= num_dense < num_layers:
        raise config.wrong("first_k_dense_replace", f"a number of layers below num_hidden_layers={num_layers}")
    return (False,) * num_dense + (True,) * (num_layers - num_dense)


def sigmoid_experts(config: JsonFields, **more: Any) -> Experts:
    """DeepSeek's router and those after it: sigmoids with a bias for the choice, groups, a scale, shared experts."""
    num_groups, best = config.integer("n_group", 1), config.integer("topk_group", 1)
    num_per_token, num_experts = config.integer("num_experts_per_tok"), config.integer("n_routed_experts")
    if num_experts % num_groups:
        raise config.wrong("n_group", f"a divisor of n_routed_experts={num_experts}")
    if not best <= num_groups:
        raise config.wrong("topk_group", f"at most n_group={num_groups}")
    if num_groups > 1 and num_per_token // best != 2:
        raise config.unsupported("topk_group", "a group must be scored by its two best experts, as Megatron does where "
                                 f"num_experts_per_tok={num_per_token} is twice topk_group")  # fmt: skip
    scale = config.number("routed_scaling_factor", 1.0)
    return Experts(
        num_experts=num_experts,
        num_per_token=num_per_token,
        ffn_hidden_size=config.integer("moe_intermediate_size"),
        layers=dense_first_layers(config),
        score="sigmoid",
        has_choice_bias=True,
        num_groups=num_groups if num_groups > 1 else None,
        num_groups_per_token=best if num_groups > 1 else None,
        weight_scale=scale if scale != 1.0 else None,
        shared_ffn_hidden_size=config.integer("moe_intermediate_size") * config.integer("n_shared_experts", 1),
        router_dtype="fp32",
        **more,
    )


def predicting_layers(config: JsonFields) -> str:
    """A pattern of the tensors of layers after the last, which predict further tokens in training."""
    first = config.integer("num_hidden_layers")
    count = config.integer("num_nextn_predict_layers", 1) if config.fields.get("num_nextn_predict_layers") else 0
    numbers = "|".join(str(first + i) for i in range(min(count, 16)))
    return rf"model\.layers\.({numbers})\..*" if numbers else ""
