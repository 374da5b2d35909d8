"""Traits of a model as Megatron-LM's arguments state them, in the words of ModelSpec. Refusals: megatron_args.py."""

from __future__ import annotations

import math
from typing import Any

from megatron_medha.core.model_spec import Experts, LatentAttention, RopeScaling
from megatron_medha.safe_files.json_fields import JsonFields

POSITIONS = {"rope": "rotary", "yarn": "rotary", "learned_absolute": "learned", "none": "none"}
SOFTMAX = {None: "plain", "vanilla": "plain", "learnable": "sinks", "off-by-one": "off-by-one"}


def traits_of(fields: JsonFields) -> dict[str, Any]:
    """Fields of ModelSpec for norms, biases, attention's variants and the MLP's activation.

    Raises CheckpointError for values of the wrong type, UnsupportedModelError for what contradicts itself.
    """
    scale = None if fields.fields.get("softmax_scale") is None else fields.number("softmax_scale")
    return {
        "has_layer_norms": fields.fields["normalization"] == "LayerNorm",
        "has_zero_centred_norms": fields.flag("apply_layernorm_1p") or fields.flag("layernorm_zero_centered_gamma"),
        "has_linear_biases": fields.flag("add_bias_linear"),
        # Where all linear layers have one it says nothing; versions differ in whether they set it then.
        "has_qkv_bias": fields.flag("add_qkv_bias") and not fields.flag("add_bias_linear"),
        "has_qk_norm": fields.flag("qk_layernorm") and not fields.flag("qk_l2_norm"),
        "has_qk_l2_norm": fields.flag("qk_l2_norm"),
        "has_output_gate": fields.flag("attention_output_gate"),
        "softmax_scale": None if scale == fields.integer("kv_channels") ** -0.5 else scale,
        "softmax": SOFTMAX[fields.fields.get("softmax_type")],
        **_window(fields),
        **_activation(fields),
    }


def position_traits(fields: JsonFields) -> dict[str, Any]:
    """Fields of ModelSpec for positions."""
    kind = fields.fields["position_embedding_type"]
    if POSITIONS[kind] != "rotary":
        return {"positions": POSITIONS[kind]}
    return {
        "rope_theta": _rope_theta(fields),
        "rope_scaling": _yarn(fields) if kind == "yarn" else _rope_scaling(fields),
        "rotary_dim": None if kind == "yarn" else _rotary_dim(fields),  # Megatron's YaRN turns whole heads
        "is_rotary_interleaved": fields.flag("rotary_interleaved"),
        "no_rope_layers": _no_rope_layers(fields),
    }


def expert_traits(fields: JsonFields) -> Experts | None:
    """The mixture of experts; None: there is none. Losses, capacities and jitter are of training alone."""
    if not fields.fields.get("num_experts"):
        return None

    def whole(key: str) -> int | None:
        return fields.integer(key) if fields.fields.get(key) else None

    num_experts, num_per_token = fields.integer("num_experts"), fields.integer("moe_router_topk", 2)
    if num_per_token > num_experts:
        raise fields.wrong("moe_router_topk", f"at most args.num_experts={num_experts}")
    scale = fields.fields.get("moe_router_topk_scaling_factor")
    num_layers = fields.integer("num_layers")
    layers = _expert_layers(fields, num_layers)
    if not any(layers):
        return None
    return Experts(
        num_experts=num_experts,
        num_per_token=num_per_token,
        ffn_hidden_size=whole("moe_ffn_hidden_size") or fields.integer("ffn_hidden_size"),
        layers=() if all(layers) else layers,
        score=fields.fields.get("moe_router_score_function") or "softmax",
        is_scored_first=fields.flag("moe_router_pre_softmax"),
        has_choice_bias=fields.flag("moe_router_enable_expert_bias"),
        num_groups=whole("moe_router_num_groups"),
        num_groups_per_token=whole("moe_router_group_topk"),
        weight_scale=None if scale is None else fields.number("moe_router_topk_scaling_factor"),
        shared_ffn_hidden_size=whole("moe_shared_expert_intermediate_size") or 0,
        has_shared_gate=fields.flag("moe_shared_expert_gate"),
        router_dtype=fields.fields.get("moe_router_dtype"),
    )


def latent_traits(fields: JsonFields) -> dict[str, Any]:
    """Fields of ModelSpec for multi-latent attention, positions included; empty without it."""
    if not fields.flag("multi_latent_attention"):
        return {}
    latent = LatentAttention(
        q_rank=None if fields.fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_head_dim"),
        rope_dim=fields.integer("qk_pos_emb_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )
    if latent.rope_dim % 2:
        raise fields.wrong("qk_pos_emb_head_dim", "even, for rotary positions")
    num_heads, head_dim = fields.integer("num_attention_heads"), latent.nope_dim + latent.rope_dim
    factor = fields.number("rotary_scaling_factor", 1.0)
    scaling, temperature = RopeScaling(), 1.0
    if factor > 1:
        # Versions disagree about what they take where one of these is absent.
        for key in ("original_max_position_embeddings", "mscale", "mscale_all_dim"):
            if fields.fields.get(key) is None:
                raise fields.unsupported("rotary_scaling_factor", f"without args.{key}")
        ratio = _yarn_ratio(fields, factor, "mscale", "mscale_all_dim")
        # The scale of the scores follows from them even where positions are not scaled.
        temperature = yarn_temperature(factor, fields.fields["mscale_all_dim"])
        if fields.fields.get("rope_type") in (None, "yarn"):
            scaling = RopeScaling(
                kind="yarn",
                factor=factor,
                original_max_context_len=fields.integer("original_max_position_embeddings"),
                beta_fast=fields.number("beta_fast", 32.0),
                beta_slow=fields.number("beta_slow", 1.0),
                attention_factor=ratio,
            )
    return {
        "latent": latent,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "rope_theta": _rope_theta(fields),
        "rope_scaling": scaling,
        "is_rotary_interleaved": True,  # Megatron takes neighbours for pairs here, whatever its argument says
        "softmax_scale": None if temperature == 1.0 else temperature**2 * head_dim**-0.5,
    }


def llama3_scaling(factor: float) -> RopeScaling:
    """What --use-rope-scaling means: constants of megatron-core's RotaryEmbedding._apply_scaling, and a factor."""
    return RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context_len=8192
    )


def _window(fields: JsonFields) -> dict[str, Any]:
    """--window-size: tokens before a query's own that it sees, and after; --window-attn-skip-freq: in which layers."""
    size, skipped = fields.fields.get("window_size"), fields.fields.get("window_attn_skip_freq")
    if not size:
        return {}
    is_pair = isinstance(size, list | tuple) and len(size) == 2 and all(type(each) is int for each in size)
    if not is_pair or size[0] < 0 or size[1] != 0:
        raise fields.wrong("window_size", "a number of tokens before a query, and 0 after it")
    window, num_layers = size[0] + 1, fields.integer("num_layers")
    if window >= fields.integer("max_position_embeddings"):
        return {}
    if skipped is None:
        return {"window": window}
    if type(skipped) is int and skipped > 0:
        layers = tuple(number % skipped != 0 for number in range(1, num_layers + 1))
    elif isinstance(skipped, list) and len(skipped) == num_layers and all(each in (0, 1) for each in skipped):
        layers = tuple(bool(each) for each in skipped)
    else:
        raise fields.wrong("window_attn_skip_freq", f"a whole number, or 0 or 1 for each of {num_layers} layers")
    return {"window": window, "window_layers": layers} if any(layers) else {}


def _activation(fields: JsonFields) -> dict[str, Any]:
    clamp = fields.fields.get("activation_func_clamp_value")
    traits = {
        "activation_clamp": None if clamp is None else fields.number("activation_func_clamp_value"),
        "gate_offset": _offset(fields),
    }
    if fields.flag("swiglu"):
        for key in ("activation_func_clamp_value", "glu_linear_offset"):
            if fields.fields.get(key) and fields.flag("bias_swiglu_fusion", True):
                raise fields.unsupported(key, "args.bias_swiglu_fusion=True, whose fused kernel computes without it")
        return {"activation": "silu", **traits}
    if fields.flag("quick_geglu"):
        return {"activation": "quick_gelu", **traits}
    if fields.flag("squared_relu"):
        return {"activation": "squared_relu", "has_gate": False}
    # Megatron's fused GELU, its default where there are biases, is the approximation by tanh; the other is exact.
    has_gate = fields.flag("geglu")
    is_fused = fields.flag("bias_gelu_fusion", True) and (has_gate or fields.flag("add_bias_linear"))
    return {"activation": "gelu_tanh" if is_fused else "gelu", "has_gate": has_gate, **(traits if has_gate else {})}


def _offset(fields: JsonFields) -> float:
    value = fields.fields.get("glu_linear_offset") or 0.0
    if not isinstance(value, int | float) or not abs(value) < 1e9:
        raise fields.wrong("glu_linear_offset", "a number")
    return float(value)


def _rope_theta(fields: JsonFields) -> float:
    # Before core 0.8 the base was 10,000 and no argument. The other two names came with 0.8 and 0.9.
    is_fixed = not any(key in fields.fields for key in ("rotary_base", "use_legacy_models", "ckpt_format"))
    return 10000.0 if is_fixed else fields.number("rotary_base")


def _rope_scaling(fields: JsonFields) -> RopeScaling:
    is_llama3 = fields.flag("use_rope_scaling")
    interpolation = fields.fields.get("rotary_seq_len_interpolation_factor")
    if is_llama3 and interpolation is not None:
        raise fields.unsupported("rotary_seq_len_interpolation_factor", "args.use_rope_scaling is set too")
    if interpolation is not None:
        return RopeScaling(kind="linear", factor=fields.number("rotary_seq_len_interpolation_factor"))
    if not is_llama3:
        return RopeScaling()
    return llama3_scaling(fields.number("rope_scaling_factor", 8.0))


def _yarn(fields: JsonFields) -> RopeScaling:
    """Of attention with a key for each head; latent attention names the same without the prefix."""
    if fields.flag("rotary_interleaved"):
        raise fields.unsupported("rotary_interleaved", "Megatron has no YaRN with interleaved pairs")
    # Early versions of Bridge's gpt-oss had the name of latent attention's.
    is_named = fields.fields.get("yarn_rotary_scaling_factor") is not None
    is_other = not is_named and (fields.fields.get("rotary_scaling_factor") or 1.0) != 1.0
    factor = fields.number("rotary_scaling_factor" if is_other else "yarn_rotary_scaling_factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_context_len=fields.integer("yarn_original_max_position_embeddings"),
        beta_fast=fields.number("yarn_beta_fast", 32.0),
        beta_slow=fields.number("yarn_beta_slow", 1.0),
        is_range_rounded=fields.flag("yarn_correction_range_round_to_int", True),
        attention_factor=_yarn_ratio(fields, factor, "yarn_mscale", "yarn_mscale_all_dim"),
    )


def _yarn_ratio(fields: JsonFields, factor: float, mscale_key: str, all_dim_key: str) -> float:
    """What cosines and sines are multiplied by; transformers reads 0 otherwise."""
    mscale, all_dim = fields.fields.get(mscale_key), fields.fields.get(all_dim_key)
    if mscale is None or all_dim is None:
        return yarn_temperature(factor, 1.0)
    for key, value in ((mscale_key, mscale), (all_dim_key, all_dim)):
        if not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise fields.wrong(key, "a number of at least 0")
    return yarn_temperature(factor, mscale) / yarn_temperature(factor, all_dim)


def yarn_temperature(factor: float, mscale: float) -> float:
    """YaRN's scale of attention at such a factor of the context."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rotary_dim(fields: JsonFields) -> int | None:
    share, head_dim = fields.number("rotary_percent"), fields.integer("kv_channels")
    if share >= 1.0:
        return None
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.wrong("rotary_percent", f"a share of args.kv_channels={head_dim} that is even and at least 2")
    return rotary_dim


def _expert_layers(fields: JsonFields, num_layers: int) -> tuple[bool, ...]:
    """--moe-layer-freq: a number N for the first of every N layers, or a list with 1 for layers that have experts."""
    value = fields.fields.get("moe_layer_freq")
    if value is None:
        value = 1
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(layer % value == 0 for layer in range(num_layers))
    if not isinstance(value, list) or len(value) != num_layers or not all(each in (0, 1) for each in value):
        raise fields.wrong("moe_layer_freq", f"a positive whole number, or 0 or 1 for each of {num_layers} layers")
    return tuple(bool(each) for each in value)


def _no_rope_layers(fields: JsonFields) -> tuple[bool, ...]:
    """--no-rope-freq: a number N for the last of every N layers, or a list with 1 for layers without."""
    value, num_layers = fields.fields.get("no_rope_freq"), fields.integer("num_layers")
    if not value:
        return ()
    if isinstance(value, int) and not isinstance(value, bool) and value > 0 and num_layers % value == 0:
        value = ([0] * (value - 1) + [1]) * (num_layers // value)
    if not isinstance(value, list) or len(value) != num_layers or not all(each in (0, 1) for each in value):
        raise fields.wrong("no_rope_freq", f"a divisor of args.num_layers={num_layers}, or 0 or 1 for each layer")
    return tuple(bool(each) for each in value)
