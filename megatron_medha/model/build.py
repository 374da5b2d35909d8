"""Builds the GPTModel of a checkpoint's architecture from Megatron-core's parts, with our attention in it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_medha.core.cost.capacity import check_divides
from megatron_medha.core.errors import ConfigError
from megatron_medha.model.attention import MedhaSelfAttention, PagedCoreAttention
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.fp8 import fp8_config
from megatron_medha.model.general_layers import (
    GeneralCoreAttention,
    GeneralSelfAttention,
    GeneralTransformerLayer,
    PostNormLayer,
    WideNorm,
    ZeroCentredNorm,
)
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.latent_attention import LatentSelfAttention
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.megatron_config import transformer_config
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs

log = logging.getLogger(__name__)

_given_up: list[str] = []  # why Transformer Engine is no longer used in this process


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    pgs: MedhaPGs,
    is_initialized: bool = True,
    fp8: str = "none",
    block_spec: TransformerBlockSubmodules | None = None,
) -> GPTModel:
    """This rank's part of the model, on `device`, in eval mode.

    is_initialized: False leaves the weights as memory was, for a checkpoint that overwrites every one of them.
    fp8: a recipe of model/fp8.py; only what Transformer Engine must know when layers are made is settled here.
    block_spec: other layers of the same names and weights (training_spec.py); None: those that serve.
    Raises ConfigError if the layout does not divide the model.
    """
    check_layout_of(config, tp=pgs.tp.size(), spp=pgs.pp.size())
    precision = fp8_config(fp8) if transformer_engine_works(device) else {}
    megatron = transformer_config(config, dtype, device, pgs, is_initialized, precision)
    tp = pgs.tp.size()
    model = _CheckpointedGPTModel(
        config=megatron,
        transformer_layer_spec=block_spec or _block_spec(config, megatron, device, pgs),
        vocab_size=-(-config.vocab_size // tp) * tp,  # padded, so that any tp divides it
        max_sequence_length=config.max_context_len,
        pre_process=pgs.pp.rank() == 0,
        post_process=pgs.pp.rank() == pgs.pp.size() - 1,
        share_embeddings_and_output_weights=config.has_tied_embeddings,
        # Megatron's own tables are fp32 angles over all positions up to the longest: wrong by 0.76 at 10M, and 5 GB.
        position_embedding_type="learned_absolute" if config.positions == "learned" else "none",
        pg_collection=pgs,
    )
    if not config.is_llama_like and block_spec is None:
        for index, layer in enumerate(model.decoder.layers):
            layer.self_attention.core_attention.place(config, index)
            if config.latent is not None and config.latent.norm_epsilon is not None:
                _set_latent_epsilon(layer.self_attention, config.latent.norm_epsilon)
    if config.embedding_scale != 1.0 and model.pre_process:
        scale = float(torch.tensor(config.embedding_scale, dtype=dtype))  # rounded as transformers does
        model.embedding.register_forward_hook(lambda _, __, embedded: embedded * scale)
    if config.logit_cap is not None and model.post_process:
        model.output_layer.register_forward_hook(partial(_capped, cap=config.logit_cap))
    # With the dtype: Megatron's local norms are made in fp32 whatever params_dtype says, and mixed they run unfused.
    model.to(device=device, dtype=dtype).eval()
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):  # decides between experts; Megatron keeps it in fp32
            bias.data = bias.data.float()
    return model


def _capped(_: torch.nn.Module, __: Any, output: tuple[Tensor, Any], cap: float) -> tuple[Tensor, Any]:
    logits, bias = output
    return torch.tanh(logits / cap) * cap, bias


def _set_latent_epsilon(attention: torch.nn.Module, epsilon: float) -> None:
    """Of the norms of latent vectors, which Megatron gives that of all others."""
    for name in ("q_layernorm", "kv_layernorm"):
        norm = getattr(attention, name, None)
        if norm is not None and hasattr(norm, "eps"):  # not an identity, where queries have no latent vector
            norm.eps = epsilon


def check_layout_of(config: ModelConfig, *, tp: int, spp: int) -> None:
    """Raises ConfigError if the degrees do not divide what they share out."""
    check_divides(config.shape(bytes_per_element=1), tp=tp, spp=spp)
    if config.latent is None:
        return
    sizes = {
        "latent vector with positions": config.latent.kv_rank + config.latent.rope_dim,
        "latent query": config.latent.q_rank or 0,
    }
    if undivided := [f"the {name}'s width of {size}" for name, size in sizes.items() if size % tp]:
        raise ConfigError(f"parallel.tp={tp} must divide {', '.join(undivided)} of {config.name}")


class _CheckpointedGPTModel(GPTModel):
    """A GPTModel whose weights are about to be loaded, on every stage."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        *args: Any,
        inference_context: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Megatron's forward; a packed batch knows its tokens' positions, which learned embeddings are looked up by."""
        if position_ids is None and inference_context is not None and inference_context.positions_T is not None:
            position_ids = inference_context.positions_T.unsqueeze(0)
        output: Tensor = super().forward(input_ids, position_ids, *args, inference_context=inference_context, **kwargs)
        return output

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
    if device.type != "cuda" or _given_up:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    except Exception:  # half-installed ones raise RuntimeError, OSError and others
        log.warning("transformer_engine_unusable", exc_info=True)
        return False
    return True


def give_up_transformer_engine(reason: str) -> None:
    """From here on, models of this process are built without it."""
    log.warning("transformer_engine_given_up reason=%s", reason)
    _given_up.append(reason)


def _block_spec(
    config: ModelConfig, megatron: TransformerConfig, device: torch.device, pgs: MedhaPGs
) -> TransformerBlockSubmodules | ModuleSpec:
    """This stage's layers, and off CUDA the last norm, which Megatron would take from Transformer Engine otherwise."""
    if not config.is_llama_like:
        return _general_block_spec(config, megatron, device, pgs)
    spec = llama_layer_spec(config, device)
    if transformer_engine_works(device):
        return spec
    num_layers = config.num_layers // pgs.pp.size()
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=WrappedTorchNorm)


def llama_layer_spec(config: ModelConfig, device: torch.device) -> ModuleSpec:
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


def _general_block_spec(
    config: ModelConfig, megatron: TransformerConfig, device: torch.device, pgs: MedhaPGs
) -> TransformerBlockSubmodules:
    """Megatron's own layers, whatever they are, with our attention in them; the same spec may stand for many layers."""
    # Absorbed projections need the norm before them apart; layers without one must not have it fused.
    has_engine = transformer_engine_works(device) and config.latent is None and config.has_pre_norms
    block = get_gpt_decoder_block_spec(
        megatron,
        use_transformer_engine=has_engine,
        normalization=megatron.normalization,
        qk_l2_norm=config.has_qk_l2_norm,
        pp_rank=pgs.pp.rank(),
    )
    norm = ZeroCentredNorm if config.has_zero_centred_norms else WrappedTorchNorm
    if not has_engine:
        block.layer_norm = norm
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        layer.module = GeneralTransformerLayer
        if config.has_post_norms:
            layer.module, layer.params = PostNormLayer, {**layer.params, "post_norm": norm}
        if not config.has_pre_norms:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
        attention.module = GeneralSelfAttention if config.latent is None else LatentSelfAttention
        attention.submodules.core_attention = GeneralCoreAttention
        if layer.submodules.mlp.module is MoELayer:
            layer.submodules.mlp.module = ExpertsLayer
            by_best = config.experts is not None and config.experts.is_group_by_best
            # Megatron gives the groups to its own class alone.
            layer.submodules.mlp.params = {"pg_collection": pgs, "is_group_by_best": by_best}
        for part in (layer.submodules, attention.submodules):
            for slot, module in vars(part).items():
                if module is WrappedTorchNorm:
                    setattr(part, slot, norm)
        if config.is_qk_norm_wide:
            for slot, num_heads in (("q_layernorm", config.num_heads), ("k_layernorm", config.num_kv_heads)):
                params = {"num_heads": num_heads, "tp_group": pgs.tp}
                setattr(attention.submodules, slot, ModuleSpec(module=WideNorm, params=params))
    return block
