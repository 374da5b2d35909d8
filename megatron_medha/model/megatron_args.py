"""The argparse Namespace that Megatron-LM keeps in its checkpoints, read into a ModelConfig and written from one.

Names and defaults are those of Megatron-LM's command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.model.model_config import ModelConfig, RopeScaling
from megatron_medha.model.safe_pickle import Opaque

# Constants of RotaryEmbedding._apply_scaling in megatron-core; --use-rope-scaling offers only the factor.
_ROPE_LOW_FREQ_FACTOR = 1.0
_ROPE_HIGH_FREQ_FACTOR = 4.0
_ROPE_ORIGINAL_CONTEXT_LEN = 8192

# What must hold for the model to be one of the Llama family: (name, value when absent, is it fine, why not).
_REQUIREMENTS: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("position_embedding_type", "learned_absolute", lambda v: v == "rope", "positions must be rotary (rope)"),
    ("normalization", "LayerNorm", lambda v: v == "RMSNorm", "norms must be RMSNorm"),
    ("swiglu", False, bool, "the MLP must be gated SiLU (--swiglu)"),
    ("add_bias_linear", True, lambda v: not v, "linear layers must have no bias (--disable-bias-linear)"),
    ("rotary_percent", 1.0, lambda v: v == 1.0, "rotary positions turn whole heads here"),
    ("rotary_interleaved", False, lambda v: not v, "rotary pairs are the two halves of a head here"),
    ("apply_layernorm_1p", False, lambda v: not v, "norm weights are not zero-centred here"),
    ("num_experts", None, lambda v: not v, "mixtures of experts are not served yet"),
    ("multi_latent_attention", False, lambda v: not v, "only grouped-query attention is"),
    ("experimental_attention_variant", None, lambda v: not v, "only grouped-query attention is"),
    ("attention_output_gate", False, lambda v: not v, "only plain grouped-query attention is"),
    ("window_size", None, lambda v: v is None, "every layer must see the whole context"),
    ("qk_l2_norm", False, lambda v: not v, "q and k are normalised by RMSNorm or not at all here"),
    ("softmax_type", "vanilla", lambda v: v == "vanilla", "the attention's softmax must be plain"),
    ("no_rope_freq", None, lambda v: not v, "every layer must have rotary positions"),
    ("apply_residual_connection_post_layernorm", False, lambda v: not v, "the residual must bypass the norms"),
    ("heterogeneous_layers_config_path", None, lambda v: not v, "layers must all be alike"),
    ("hybrid_attention_ratio", 0.0, lambda v: not v, "every layer must have attention"),
    ("hybrid_override_pattern", None, lambda v: not v, "every layer must have attention"),
    ("activation_func_clamp_value", None, lambda v: v is None, "the MLP's activation must be plain SiLU"),
    ("glu_linear_offset", 0.0, lambda v: not v, "the MLP's gate must be plain"),
)


def config_from_args(
    args: argparse.Namespace,
    path: Path,
    *,
    name: str,
    dtype: str,
    num_embedding_rows: int,
    num_tokenizer_ids: int | None,
    stop_token_ids: tuple[int, ...],
) -> ModelConfig:
    """The architecture those arguments describe.

    path: the file they come from, for errors. num_embedding_rows, dtype: of the stored embedding.
    num_tokenizer_ids: ids of the tokenizer beside the checkpoint, if there is one.
    Raises CheckpointError if arguments are missing or contradict each other, UnsupportedModelError with the reason
    for what cannot be run.
    """
    for key, default, is_fine, why in _REQUIREMENTS:
        value = getattr(args, key, default)
        if not is_fine(default if value is None else value):
            raise UnsupportedModelError(f"{path}: args.{key}={value!r} is not supported: {why}")
    num_heads = _integer(args, path, "num_attention_heads")
    is_grouped = getattr(args, "group_query_attention", False)
    num_kv_heads = _integer(args, path, "num_query_groups") if is_grouped else num_heads
    hidden_size = _integer(args, path, "hidden_size")
    return ModelConfig(
        name=name,
        num_layers=_integer(args, path, "num_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_integer(args, path, "ffn_hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(args, path, "kv_channels", hidden_size // num_heads),
        vocab_size=_vocab_size(args, path, num_embedding_rows, num_tokenizer_ids),
        max_context_len=_integer(args, path, "max_position_embeddings"),
        norm_epsilon=_number(args, path, "norm_epsilon", 1e-5),
        rope_theta=_number(args, path, "rotary_base", 10000.0),
        rope_scaling=_rope_scaling(args, path),
        has_qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        has_qk_norm=bool(getattr(args, "qk_layernorm", False)),
        has_tied_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
        dtype=dtype,
        stop_token_ids=stop_token_ids,
    )


def args_from_config(config: ModelConfig, dtype: torch.dtype) -> argparse.Namespace:
    """The arguments Megatron-LM would have been started with to train this model on one device.

    Raises UnsupportedModelError if Megatron-LM has no argument for some trait of the model.
    """
    args = argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        group_query_attention=config.num_kv_heads != config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        max_position_embeddings=config.max_context_len,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        make_vocab_size_divisible_by=1,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        rotary_base=config.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None,
        use_rope_scaling=False,
        rope_scaling_factor=8.0,
        normalization="RMSNorm",
        norm_epsilon=config.norm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.has_qkv_bias,
        qk_layernorm=config.has_qk_norm,
        untie_embeddings_and_output_weights=not config.has_tied_embeddings,
        num_experts=None,
        multi_latent_attention=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        ckpt_format="torch_dist",
        transformer_impl="local",
        use_mcore_models=True,
    )
    scaling = config.rope_scaling
    megatron_llama3 = RopeScaling(
        kind="llama3",
        factor=scaling.factor,
        low_freq_factor=_ROPE_LOW_FREQ_FACTOR,
        high_freq_factor=_ROPE_HIGH_FREQ_FACTOR,
        original_max_context_len=_ROPE_ORIGINAL_CONTEXT_LEN,
    )
    if scaling == megatron_llama3:
        args.use_rope_scaling, args.rope_scaling_factor = True, scaling.factor
    elif scaling.kind == "linear":
        args.rotary_seq_len_interpolation_factor = scaling.factor
    elif scaling.kind != "none":
        raise UnsupportedModelError(f"Megatron-LM has no arguments for {scaling}")
    return args


def _rope_scaling(args: argparse.Namespace, path: Path) -> RopeScaling:
    is_llama3 = bool(getattr(args, "use_rope_scaling", False))
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if is_llama3 and interpolation is not None:
        raise UnsupportedModelError(
            f"{path}: args.use_rope_scaling together with args.rotary_seq_len_interpolation_factor is not supported"
        )
    if interpolation is not None:
        return RopeScaling(kind="linear", factor=_number(args, path, "rotary_seq_len_interpolation_factor"))
    if not is_llama3:
        return RopeScaling()
    return RopeScaling(
        kind="llama3",
        factor=_number(args, path, "rope_scaling_factor", 8.0),
        low_freq_factor=_ROPE_LOW_FREQ_FACTOR,
        high_freq_factor=_ROPE_HIGH_FREQ_FACTOR,
        original_max_context_len=_ROPE_ORIGINAL_CONTEXT_LEN,
    )


def _vocab_size(
    args: argparse.Namespace, path: Path, num_embedding_rows: int, num_tokenizer_ids: int | None
) -> int:
    """Rows of the embedding that mean a token; Megatron pads it to a multiple of 128 * tp."""
    stated = getattr(args, "vocab_size", None)
    if stated is not None:
        # Megatron's NullTokenizer adds an end token of its own to the number it is told.
        vocab_size = _integer(args, path, "vocab_size") + (getattr(args, "tokenizer_type", None) == "NullTokenizer")
    else:
        vocab_size = num_tokenizer_ids or num_embedding_rows
    if vocab_size > num_embedding_rows:
        raise CheckpointError(
            f"{path}: a vocabulary of {vocab_size} tokens does not fit the embedding's {num_embedding_rows} rows"
        )
    return vocab_size


def _integer(args: argparse.Namespace, path: Path, key: str, default: int | None = None) -> int:
    value = _stated(args, path, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: args.{key}={value!r} must be a positive whole number")
    return value


def _number(args: argparse.Namespace, path: Path, key: str, default: float | None = None) -> float:
    value = _stated(args, path, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: args.{key}={value!r} must be a positive number")
    return float(value)


def _stated(args: argparse.Namespace, path: Path, key: str, default: Any) -> Any:
    value = getattr(args, key, None)
    if value is None:
        value = default
    if value is None or isinstance(value, Opaque):
        raise CheckpointError(f"{path}: args.{key} is missing")
    return value
