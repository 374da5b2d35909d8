"""Builds the GPTModel of a checkpoint's architecture from Megatron-core's parts, with our attention in it."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_medha.core.cost.capacity import check_divides
from megatron_medha.model.attention import MedhaSelfAttention, PagedCoreAttention
from megatron_medha.model.fp8 import fp8_config
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs

log = logging.getLogger(__name__)


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    pgs: MedhaPGs,
    is_initialized: bool = True,
    fp8: str = "none",
) -> GPTModel:
    """This rank's part of the model, on `device`, in eval mode.

    is_initialized: False leaves the weights as memory was, for a checkpoint that overwrites every one of them.
    fp8: a recipe of model/fp8.py; only what Transformer Engine must know when layers are made is settled here.
    Raises ConfigError if the layout does not divide the model.
    """
    check_divides(config.shape(dtype.itemsize), tp=pgs.tp.size(), spp=pgs.pp.size())
    transformer_config = _transformer_config(config, dtype, device, pgs, is_initialized, fp8)
    tp = pgs.tp.size()
    model = _CheckpointedGPTModel(
        config=transformer_config,
        transformer_layer_spec=_block_spec(config, device, pgs),
        vocab_size=-(-config.vocab_size // tp) * tp,  # padded, so that any tp divides it
        max_sequence_length=config.max_context_len,
        pre_process=pgs.pp.rank() == 0,
        post_process=pgs.pp.rank() == pgs.pp.size() - 1,
        share_embeddings_and_output_weights=config.has_tied_embeddings,
        # Megatron's own tables are fp32 angles over all positions up to the longest: wrong by 0.76 at 10M, and 5 GB.
        position_embedding_type="none",
        pg_collection=pgs,
    )
    # With the dtype: Megatron's local norms are made in fp32 whatever params_dtype says, and mixed they run unfused.
    return model.to(device=device, dtype=dtype).eval()


class _CheckpointedGPTModel(GPTModel):
    """A GPTModel whose weights are about to be loaded, on every stage."""

    def setup_embeddings_and_output_layer(self) -> None:
        """Megatron sends tied embeddings from the first stage to the last here, through CUDA; loading fills both."""
        if self.config.pipeline_model_parallel_size == 1:
            super().setup_embeddings_and_output_layer()

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: dict[str, Any], output_key: str, embedding_key: str, metadata: dict[str, Any]
    ) -> None:
        """On the last stage the output layer is the embedding; Megatron asks for global groups, which are not there."""
        if self.post_process and not self.pre_process:
            group = metadata["dp_cp_group"]
            sharded_state_dict[output_key] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.output_layer.weight,
                key=embedding_key,
                replica_id=(1, 0, group.rank()),  # the first stage's is the first
                allow_shape_mismatch=True,
                tp_group=self.tp_group,
                dp_cp_group=group,
            )


def transformer_engine_works(device: torch.device) -> bool:
    """Whether Transformer Engine can be used; a broken installation is said and passed over."""
    if device.type != "cuda":
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    except Exception:  # half-installed ones raise RuntimeError, OSError and others
        log.warning("transformer_engine_unusable", exc_info=True)
        return False
    return True


def _block_spec(config: ModelConfig, device: torch.device, pgs: MedhaPGs) -> TransformerBlockSubmodules | ModuleSpec:
    """This stage's layers, and off CUDA the last norm, which Megatron would take from Transformer Engine otherwise."""
    spec = _layer_spec(config, device)
    if transformer_engine_works(device):
        return spec
    num_layers = config.num_layers // pgs.pp.size()
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=WrappedTorchNorm)


def _layer_spec(config: ModelConfig, device: torch.device) -> ModuleSpec:
    """One decoder layer: Transformer Engine's linear layers and norms on CUDA, Megatron's own elsewhere."""
    if transformer_engine_works(device):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.has_qk_norm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.has_qk_norm, normalization="RMSNorm")
    spec.module = MedhaTransformerLayer
    attention = spec.submodules.self_attention
    attention.module = MedhaSelfAttention
    attention.params = {**attention.params, "rotary": Rotary(config)}
    attention.submodules.core_attention = PagedCoreAttention
    return spec


def _transformer_config(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, pgs: MedhaPGs, is_initialized: bool, fp8: str
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=config.has_qk_norm,
        add_bias_linear=False,
        add_qkv_bias=config.has_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.02,
        perform_initialization=is_initialized,
        use_cpu_initialization=device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=pgs.tp.size(),
        pipeline_model_parallel_size=pgs.pp.size(),
        # What follows fails, or compiles for seconds at the first forward, where there is no CUDA.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_sync=False,
        **(fp8_config(fp8) if transformer_engine_works(device) else {}),
    )
