"""A model as a CPU runs it: packed weights, native norms and activations, and whole steps in one call of the library.

What of it this model can have on this machine is settled at load, for all steps. Then there are three ways:
decodes of a whole model go straight to the decoder (worker/plain_decodes.py); other steps go through the model's
forward, which is the decoder's call where there is one; steps with rows shared among kvp ranks go through the model's
own layers and the kernels put into them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.linear.native_decoder import DecoderSizes, LayerWeights, NativeDecoder, OutputWeights
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativePointwise
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.packed_linear import PackedLinear, pack_linears

log = logging.getLogger(__name__)


class _UnsupportedPart(Exception):
    """A part of the model that the native decoder does not have; the message is for the log."""


def use_cpu_kernels(
    model: GPTModel,
    backend: AttentionBackend,
    sum_over_tp: Callable[[Tensor], object] | None = None,
    *,
    has_int8_weights: bool = False,
    linear_backend: str = "auto",
) -> NativeDecoder | None:
    """Put into the model what a CPU can have; inference only, for good. Returns the decoder of its steps, if any.

    For the arguments see pack_linears. Says in the log what is used and why the rest is not.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    pack_linears(model, sum_over_tp, has_int8_weights=has_int8_weights, linear_backend=linear_backend)
    for module in model.modules():
        if isinstance(module, ExpertsLayer) and module.sum_over_tp is not None and sum_over_tp is not None:
            module.sum_over_tp = sum_over_tp
    try:
        use_native_passes(model)
        decoder = _decoder_of(model, backend)
    except (_UnsupportedPart, NativeUnavailable) as reason:
        log.info("decode=torch reason=%r (the native decoder runs Llama-like models in bfloat16)", str(reason))
        return None
    log.info("decode=native layers=%d", decoder.num_layers)
    model.forward = NativeForward(model, decoder)  # type: ignore[method-assign]
    return decoder


def use_native_passes(model: GPTModel) -> None:
    """Put the native RMS norm and gated SiLU in place of torch's. Raises NativeUnavailable."""
    pointwise = NativePointwise()
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            # What torch takes where none is given.
            epsilon = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
            module.forward = partial(  # type: ignore[method-assign]
                pointwise.rms_norm, weight_C=module.weight, epsilon=epsilon
            )
        elif isinstance(module, MedhaTransformerLayer):
            module.gated_silu = pointwise.gated_silu  # type: ignore[method-assign]


class NativeForward:
    """Stands in for the forward of a GPTModel. Batches with rows shared among kvp ranks take the model's own."""

    def __init__(self, model: GPTModel, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        self.plain = model.forward
        self._block = model.decoder
        self._is_first, self._is_last = model.pre_process, model.post_process
        self._hidden_size = model.config.hidden_size

    def __call__(
        self, token_ids_1T: Tensor, *args: Any, inference_context: PackedBatch | None = None, **kwargs: Any
    ) -> Tensor:
        """As GPTModel's: [1, R, V] on the last stage, hidden states [T, 1, C] before."""
        batch = inference_context
        if batch is None or batch.shared is not None:
            return self.plain(token_ids_1T, *args, inference_context=inference_context, **kwargs)
        if self._is_first:
            token_ids_T = token_ids_1T[0]
            hidden_TC = torch.empty(len(token_ids_T), self._hidden_size, dtype=torch.bfloat16)
        else:
            token_ids_T, hidden_TC = None, self._block.input_tensor[:, 0].contiguous()
        num_layers, before_layer = self.decoder.num_layers, batch.before_layer
        calls = [range(num_layers)] if before_layer is None else [range(i, i + 1) for i in range(num_layers)]
        logits_RV = None
        for layers in calls:
            if before_layer is not None:
                before_layer()
            logits_RV = self.decoder.run(
                hidden_TC,
                batch.plan,
                batch.kv_layers,
                batch.rotation,
                token_ids_T=token_ids_T if layers.start == 0 else None,
                logit_rows_R=batch.logit_rows if self._is_last and layers.stop == num_layers else None,
                layers=layers,
            )
        if logits_RV is None:
            return hidden_TC.unsqueeze(1)
        if batch.hidden_rows is not None:
            batch.hidden = self._block.final_layernorm(hidden_TC.index_select(0, batch.hidden_rows))
        return logits_RV.unsqueeze(0)


def _decoder_of(model: GPTModel, backend: AttentionBackend) -> NativeDecoder:
    """The same weights in a native decoder. Raises _UnsupportedPart."""
    if not backend.is_native:
        raise _UnsupportedPart(f"attention_backend={backend.name}")
    config = model.config
    layers = [_layer_of(layer) for layer in model.decoder.layers]
    if not layers:
        raise _UnsupportedPart("a stage without layers")
    embedding = model.embedding.word_embeddings.weight if model.pre_process else None
    if embedding is not None and (embedding.dtype != torch.bfloat16 or not embedding.is_contiguous()):
        raise _UnsupportedPart(f"an embedding in {embedding.dtype}")
    output = None
    if model.post_process:
        output = OutputWeights(_norm_of(model.decoder.final_layernorm), _linear_of(model.output_layer))
    sizes = DecoderSizes(
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_query_groups,
        queries_per_kv_head=config.num_attention_heads // config.num_query_groups,
        head_dim=config.kv_channels,
        ffn_size=config.ffn_hidden_size,
        epsilon=config.layernorm_epsilon,
        scale=model.decoder.layers[0].self_attention.core_attention.scale,
    )
    return NativeDecoder(sizes, layers, embedding, output)


def _layer_of(layer: torch.nn.Module) -> LayerWeights:
    if type(layer) is not MedhaTransformerLayer or type(layer.mlp) is not MLP:
        raise _UnsupportedPart(f"a layer that is a {type(layer).__name__} with a {type(layer.mlp).__name__}")
    attention = layer.self_attention
    has_qk_norm = layer.config.qk_layernorm
    for linear in (attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
        if linear.bias is not None:
            raise _UnsupportedPart("a bias that the decoder does not add")
    return LayerWeights(
        attention_norm_C=_norm_of(layer.input_layernorm),
        mlp_norm_C=_norm_of(layer.pre_mlp_layernorm),
        q_norm_D=_norm_of(attention.q_layernorm) if has_qk_norm else None,
        k_norm_D=_norm_of(attention.k_layernorm) if has_qk_norm else None,
        qkv=_linear_of(attention.linear_qkv),
        proj=_linear_of(attention.linear_proj),
        gate_and_up=_linear_of(layer.mlp.linear_fc1),
        down=_linear_of(layer.mlp.linear_fc2),
    )


def _norm_of(norm: torch.nn.Module) -> Tensor:
    if not isinstance(norm, torch.nn.RMSNorm) or norm.weight.dtype != torch.bfloat16:
        raise _UnsupportedPart(f"a norm that is a {type(norm).__name__} in {norm.weight.dtype}")
    return norm.weight


def _linear_of(linear: ColumnParallelLinear | RowParallelLinear) -> NativeLinear:
    packed = linear.forward
    if not isinstance(packed, PackedLinear) or not packed.is_whole or not isinstance(packed.multiply, NativeLinear):
        raise _UnsupportedPart("linear layers that are not native ones on a single tensor-parallel rank")
    return packed.multiply
