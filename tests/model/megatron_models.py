"""Random models as Megatron-LM builds, computes and saves them: from the arguments its own parser leaves.

TransformerConfig is made as core_transformer_config_from_args makes it, the model as gpt_builder makes it. Its forward
is Megatron's own, in fp32, over the whole sequence. Nothing of ours has a part in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

RECORDED = Path(__file__).parents[1] / "models" / "megatron_args"
VOCAB_SIZE = 509  # a prime: no tp divides it, so the padding of the vocabulary is in every comparison
# Fields of Megatron-LM's arguments that say how a model was trained, not what it is.
_OF_TRAINING = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
    "sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers", "fp16", "bf16",
    "params_dtype", "fp8", "fp4", "cp_comm_type", "pipeline_model_parallel_layout",
)  # fmt: skip


def with_engines_names(args: argparse.Namespace) -> Callable[[str], str]:
    """Names of a layer's norms in Transformer Engine's spec, by those of the local one (gpt_layer_specs.py)."""
    if getattr(args, "multi_latent_attention", False):
        pairs = [
            ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
            ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
        ]
        if args.num_experts:  # the first layer of those saved here is dense
            pairs.append(("layers.0.pre_mlp_layernorm.", "layers.0.mlp.linear_fc1.layer_norm_"))
        else:
            pairs.append(("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))
    else:
        pairs = [("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")] if args.num_experts else []

    def renamed(key: str) -> str:
        for local, engine in pairs:
            key = key.replace(local, engine)
        return key

    return renamed


def recorded_args(version: str, **options: Any) -> argparse.Namespace:
    """What Megatron-LM's parser of a version left for a small Llama, with changes."""
    args: dict[str, Any] = {}
    for path in sorted(RECORDED.glob("*.json")):
        file = json.loads(path.read_text())
        args = {key: value for key, value in args.items() if key not in file["absent"]} | file["llama"]
        if file["version"] == version:
            break
    small = {"max_position_embeddings": 4096, "vocab_size": None, "padded_vocab_size": VOCAB_SIZE}
    args = {key: None if isinstance(value, dict) else value for key, value in args.items()}
    return argparse.Namespace(**{**args, **small, **options})


def megatron_config(args: argparse.Namespace) -> TransformerConfig:
    """As Megatron-LM's core_transformer_config_from_args; dropout, fusions and layout are those of a CPU."""
    cls = MLATransformerConfig if getattr(args, "multi_latent_attention", False) else TransformerConfig
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
    fields = {key: value for key, value in fields.items() if key not in _OF_TRAINING}
    fields["layernorm_epsilon"] = getattr(args, "norm_epsilon", None) or args.layernorm_epsilon
    if hasattr(args, "apply_layernorm_1p"):
        fields["layernorm_zero_centered_gamma"] = args.apply_layernorm_1p
    fields["num_moe_experts"] = args.num_experts
    if args.swiglu:
        fields |= {"activation_func": F.silu, "gated_linear_unit": True}
    elif args.squared_relu:
        fields["activation_func"] = squared_relu
    elif args.quick_geglu:
        fields |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    elif args.bias_gelu_fusion:
        fields["activation_func"] = fused_gelu  # the kernel itself goes through torch.compile
    if not args.group_query_attention:
        fields["num_query_groups"] = None
    if not fields.get("rope_type"):
        fields.pop("rope_type", None)
    return cls(**{
        **fields, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
        "params_dtype": torch.float32, "pipeline_dtype": torch.float32, "masked_softmax_fusion": False,
        "bias_activation_fusion": False, "bias_dropout_fusion": False, "persist_layer_norm": False,
        "memory_efficient_layer_norm": False, "gradient_accumulation_fusion": False, "apply_rope_fusion": False,
        "batch_p2p_sync": False, "transformer_impl": "local", "attention_softmax_in_fp32": True,
        "moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": False, "moe_permute_fusion": False,
    })  # fmt: skip


def fused_gelu(x: Tensor) -> Tensor:
    """What bias_gelu_fusion computes, in its own words: fused_bias_gelu.py."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class OnePlusNorm(torch.nn.Module):
    """Transformer Engine's zero-centred norms, in fp64: off CUDA Megatron has none."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if config.normalization == "LayerNorm" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        if self.bias is not None:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * (1.0 + self.weight.double())
        return (wide if self.bias is None else wide + self.bias.double()).to(x.dtype)


class PlainAttention(DotProductAttention):
    """Causal attention with its softmax in fp64.

    Megatron's own takes no values of another width than keys, and makes the mask of a window on a GPU.
    """

    def __init__(self, *, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        config = self.config
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        self.most_keys = config.window_size[0] + 1 if has_window else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        group = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
        scores = torch.einsum("sbhd,tbhd->bhst", query.double(), key.double()) * self.softmax_scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        if self.most_keys is not None:
            hidden |= torch.ones_like(hidden).tril(-self.most_keys)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.softmax_offset is not None:
            beside = self.softmax_offset.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, beside), dim=-1)
        weights = scores.softmax(-1)[..., : len(key)]
        return torch.einsum("bhst,tbhd->sbhd", weights, value.double()).flatten(2).to(query.dtype)


def megatron_model(args: argparse.Namespace, pgs: Any) -> GPTModel:
    """As Megatron-LM's gpt_builder, with random weights that make spread logits."""
    config = megatron_config(args)
    if args.position_embedding_type == "yarn":  # as its providers do; the parser has no arguments for it
        for key, value in vars(args).items():
            if key.startswith("yarn_"):
                setattr(config, key, value)
    zero_centred, config.layernorm_zero_centered_gamma = config.layernorm_zero_centered_gamma, False
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization,
        qk_l2_norm=getattr(args, "qk_l2_norm", False), pp_rank=0,
    )  # fmt: skip
    if zero_centred:
        block.layer_norm = OnePlusNorm
        for layer in block.layer_specs:
            for part in (layer.submodules, layer.submodules.self_attention.submodules):
                for slot, module in vars(part).items():
                    if module is WrappedTorchNorm:
                        setattr(part, slot, OnePlusNorm)
    if config.multi_latent_attention or config.window_size:
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PlainAttention
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    torch.manual_seed(0)
    model = GPTModel(
        config=config, transformer_layer_spec=block, vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings, position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rotary_percent=args.rotary_percent, rotary_base=args.rotary_base, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor, pg_collection=pgs,
    ).float().eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter.uniform_(*((-0.5, 0.5) if zero_centred else (0.5, 1.5)))
            elif name.endswith("softmax_offset"):
                parameter.uniform_(-1.0, 3.0)
            else:
                parameter.normal_(0.0, 0.2)
        for name, bias in model.named_buffers():
            if name.endswith("expert_bias"):
                bias.uniform_(-0.2, 0.2)
    return model


def megatron_logits(model: GPTModel, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of a prompt by Megatron's own forward, as in training."""
    num_tokens = len(token_ids)
    hidden = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).triu(1)
    with torch.inference_mode():
        logits: Tensor = model(token_ids[None], torch.arange(num_tokens)[None], hidden)[0]
    return logits


def save_megatron(
    model: GPTModel,
    args: argparse.Namespace,
    directory: Path,
    layout: dict[str, bool] | None = None,
    renamed: Callable[[str], str] = lambda key: key,
) -> None:
    """A torch_dist checkpoint, as Megatron-LM writes one.

    layout: how tensors are cut and named, see megatron_checkpoint.py. renamed: to the names of another spec.
    """
    target = directory / "iter_0000010"
    target.mkdir(parents=True)
    filesystem_async._results_queue = queue.SimpleQueue()
    tensors = model.sharded_state_dict(metadata={"dp_cp_group": model.pg_collection.dp_cp, **(layout or {})})
    for part in tensors.values():
        if isinstance(part, ShardedTensor | ShardedTensorFactory):
            part.key = renamed(part.key)
    dist_checkpointing.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": tensors}, str(target)
    )
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
