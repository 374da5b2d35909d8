"""The argparse Namespace that Megatron-LM keeps in its checkpoints, read into a ModelConfig and written from one.

Names are those of Megatron-LM's command line. Since core 0.16 two of them follow TransformerConfig: norm_epsilon became
layernorm_epsilon, apply_layernorm_1p became layernorm_zero_centered_gamma. Both are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.models.known_fields import KNOWN_FIELDS, names_of
from megatron_medha.models.megatron_traits import (
    POSITIONS,
    SOFTMAX,
    expert_traits,
    latent_traits,
    llama3_scaling,
    position_traits,
    traits_of,
)
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.safe_files.checkpoint_files import listed, shown
from megatron_medha.safe_files.json_fields import JsonFields
from megatron_medha.safe_files.safe_pickle import Opaque


class Requirement(NamedTuple):
    """Values of an argument with which a model is served."""

    name: str
    is_fine: Callable[[Any], bool]
    reason: str  # why other values are refused


NEEDED = names_of("megatron_lm", "needed")
_NORMS = ("RMSNorm", "LayerNorm")


def _is_one_of(known: Collection[Any], value: Any) -> bool:
    return isinstance(value, str | None) and value in known


REQUIREMENTS = (
    Requirement("position_embedding_type", lambda v: _is_one_of(POSITIONS, v), f"one of {', '.join(POSITIONS)} is"),
    Requirement("normalization", lambda v: _is_one_of(_NORMS, v), f"one of {', '.join(_NORMS)} is"),
    Requirement("softmax_type", lambda v: _is_one_of(SOFTMAX, v), "vanilla, learnable and off-by-one are"),
    Requirement("spec", lambda v: v is None, "layers of the training script's own are not known here"),
    *(
        Requirement(name, lambda v: not v, reason)
        for reason, names in KNOWN_FIELDS["megatron_lm"]["unset"].items()
        for name in names.split()
    ),
)
_BALANCING = (None, "none", "aux_loss", "seq_aux_loss", "global_aux_loss")
# Where there are experts, or multi-latent attention.
_OF_EXPERTS = (
    Requirement("moe_router_score_function", lambda v: v in (None, "softmax", "sigmoid"), "softmax and sigmoid are"),
    Requirement("moe_router_dtype", lambda v: v in (None, "fp32", "fp64"), "fp32 and fp64 are"),
    Requirement(
        "moe_router_load_balancing_type",
        lambda v: all(each in _BALANCING for each in (v if isinstance(v, list) else [v])),
        f"one of {', '.join(map(str, _BALANCING[1:]))} is",
    ),
    *(
        Requirement(name, lambda v: not v, reason)
        for reason, names in KNOWN_FIELDS["megatron_lm"]["unset_with_experts"].items()
        for name in names.split()
    ),
)
_OF_LATENT = (
    Requirement("position_embedding_type", lambda v: v == "rope", "with multi-latent attention rope is"),
    Requirement("rotary_percent", lambda v: v == 1.0, "with multi-latent attention 1.0 is"),
    Requirement("rope_type", lambda v: v in (None, "rope", "yarn"), "rope and yarn are"),
    Requirement("softmax_type", lambda v: v in (None, "vanilla"), "with multi-latent attention vanilla is"),
    *(
        Requirement(name, lambda v: not v, "not with multi-latent attention")
        for name in ("rotary_interleaved", "qk_l2_norm", "attention_output_gate", "no_rope_freq", "softmax_scale",
                     "use_rope_scaling", "rotary_seq_len_interpolation_factor")
    ),
)  # fmt: skip
_KNOWN = names_of("megatron_lm", "read") | names_of("megatron_lm", "harmless") | {
    each.name for each in (*REQUIREMENTS, *_OF_EXPERTS, *_OF_LATENT)
}
_HARMLESS_PREFIXES = tuple(names_of("megatron_lm", "harmless_prefixes"))

# Arguments that have two names: until core 0.15, since core 0.16.
_RENAMED = (("norm_epsilon", "layernorm_epsilon"), ("apply_layernorm_1p", "layernorm_zero_centered_gamma"))


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
    Raises CheckpointError if arguments are missing or contradict each other, UnsupportedModelError with all the
    reasons why the model cannot be run.
    """
    args = _without_tensors(args)
    _check_complete(args, path)
    _refuse_unsupported(args, path)
    fields = JsonFields(path, vars(args), "args.")
    num_heads = fields.integer("num_attention_heads")
    norm_epsilon = "layernorm_epsilon" if fields.fields.get("norm_epsilon") is None else "norm_epsilon"
    vocab_size = _vocab_size(fields, num_embedding_rows, num_tokenizer_ids)
    attention = {
        "num_kv_heads": fields.integer("num_query_groups") if fields.flag("group_query_attention") else num_heads,
        "head_dim": fields.integer("kv_channels"),
    }
    return ModelConfig(
        name=name,
        num_layers=fields.integer("num_layers"),
        hidden_size=fields.integer("hidden_size"),
        ffn_hidden_size=fields.integer("ffn_hidden_size"),
        num_heads=num_heads,
        vocab_size=vocab_size,
        max_context_len=fields.integer("max_position_embeddings"),
        norm_epsilon=fields.number(norm_epsilon),
        **{**attention, **position_traits(fields), **traits_of(fields), **latent_traits(fields)},
        experts=expert_traits(fields),
        has_tied_embeddings=not fields.flag("untie_embeddings_and_output_weights"),
        dtype=dtype,
        stop_token_ids=tuple(token_id for token_id in stop_token_ids if token_id < vocab_size),
    )


def args_from_config(config: ModelConfig, dtype: torch.dtype) -> argparse.Namespace:
    """The arguments Megatron-LM would have been started with to train this model on one device.

    Raises UnsupportedModelError if Megatron-LM has no argument for some trait of the model, or none is written here.
    """
    if config.traits:
        raise UnsupportedModelError(f"{config.name}: {', '.join(config.traits)}: not written as Megatron's arguments")
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
    if scaling == llama3_scaling(scaling.factor):
        args.use_rope_scaling, args.rope_scaling_factor = True, scaling.factor
    elif scaling.kind == "linear":
        args.rotary_seq_len_interpolation_factor = scaling.factor
    elif scaling.kind != "none":
        raise UnsupportedModelError(f"Megatron-LM has no arguments for {scaling}")
    return args


def _without_tensors(args: argparse.Namespace) -> argparse.Namespace:
    """The same; a tensor, which no option is, becomes an Opaque, which is set and equal to nothing."""
    fields = vars(args).items()
    return argparse.Namespace(**{k: Opaque("a tensor") if isinstance(v, torch.Tensor) else v for k, v in fields})


def _check_complete(args: argparse.Namespace, path: Path) -> None:
    """Raise CheckpointError for every argument that is needed and absent, or stated twice with different values."""
    problems = [f"args.{key} is missing" for key in sorted(NEEDED) if not hasattr(args, key)]
    for old, new in _RENAMED:
        values = [getattr(args, key) for key in (old, new) if getattr(args, key, None) is not None]
        if not values:
            problems.append(f"args.{old} (args.{new} since core 0.16) is missing")
        elif values[0] != values[-1]:
            both = f"args.{old}={shown(values[0])} and args.{new}={shown(values[-1])}"
            problems.append(f"{both} are two names of one argument")
    if problems:
        raise CheckpointError(listed([f"{path}: {problem}" for problem in problems]))


def _refuse_unsupported(args: argparse.Namespace, path: Path) -> None:
    """Raise UnsupportedModelError for everything that would change the answer, all at once."""
    has_experts, is_latent = getattr(args, "num_experts", None), getattr(args, "multi_latent_attention", False)
    requirements = [*REQUIREMENTS, *(_OF_EXPERTS if has_experts else ()), *(_OF_LATENT if is_latent else ())]
    problems = [
        f"args.{name}={shown(getattr(args, name))} is not supported: {reason}"
        for name, is_fine, reason in requirements
        if hasattr(args, name) and not is_fine(getattr(args, name))
    ]
    problems += [
        f"args.{name}={shown(value)} is not supported: this argument is not known here, and may change what the model "
        "computes. If it does not, delete it from 'args' in this file and start again"
        for name, value in sorted(vars(args).items())
        if value and name not in _KNOWN and not name.startswith(_HARMLESS_PREFIXES)
        and not (name.startswith("moe_") and not has_experts)
    ]
    if problems:
        raise UnsupportedModelError(listed([f"{path}: {problem}" for problem in problems]))


def _vocab_size(fields: JsonFields, num_embedding_rows: int, num_tokenizer_ids: int | None) -> int:
    """Rows of the embedding that mean a token; Megatron pads it to a multiple of 128 * tp."""
    if fields.fields.get("vocab_size") is not None:
        # Until core 0.17 Megatron's NullTokenizer adds an end token of its own to the vocabulary.
        is_null = fields.fields.get("tokenizer_type") == "NullTokenizer"
        adds_end = is_null and "null_tokenizer_eod_id" not in fields.fields
        vocab_size = fields.integer("vocab_size") + adds_end
    else:
        vocab_size = num_tokenizer_ids or num_embedding_rows
    if vocab_size > num_embedding_rows:
        raise CheckpointError(
            f"{fields.path}: a vocabulary of {vocab_size} tokens does not fit the embedding's {num_embedding_rows} rows"
        )
    return vocab_size
