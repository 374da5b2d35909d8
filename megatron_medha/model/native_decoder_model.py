"""Runs a model through the native decoder, where all of its parts are ones that it knows; inference on a CPU."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.linear.native_decoder import DecoderSizes, LayerWeights, NativeDecoder, OutputWeights
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.native_passes import NativeRMSNorm
from megatron_medha.model.packed_linear import PackedLinear

log = logging.getLogger(__name__)


class _UnsupportedPart(Exception):
    """A part of the model that the native decoder does not have; the message is for the log."""


def use_native_decoder(model: GPTModel) -> None:
    """Replace the model's forward where it can be; elsewhere, said in the log, nothing changes.

    After pack_linears and use_native_passes, which settle what the parts are.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    try:
        decoder = _decoder_of(model)
    except _UnsupportedPart as reason:
        log.info("native_decoder used=no reason=%r", str(reason))
        return
    log.info("native_decoder used=yes layers=%d", decoder.num_layers)
    model.forward = _NativeForward(model, decoder)  # type: ignore[method-assign]


def whole_decoder(model: GPTModel) -> NativeDecoder | None:
    """The native decoder that runs the model, where it does and the model is not one stage of several."""
    forward = model.forward
    is_whole = isinstance(forward, _NativeForward) and model.pre_process and model.post_process
    return forward.decoder if is_whole else None


class _NativeForward:
    """Stands in for the forward of a GPTModel. Batches with rows shared among kvp ranks take the model's own."""

    def __init__(self, model: GPTModel, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        self._plain = model.forward
        self._block = model.decoder
        self._is_first, self._is_last = model.pre_process, model.post_process
        self._hidden_size = model.config.hidden_size

    def __call__(
        self, token_ids_1T: Tensor, *args: Any, inference_context: PackedBatch | None = None, **kwargs: Any
    ) -> Any:
        """As GPTModel's: [1, R, V] on the last stage, hidden states [T, 1, C] before."""
        batch = inference_context
        if batch is None or batch.shared is not None or not isinstance(batch.backend, NativeAttention):
            return self._plain(token_ids_1T, *args, inference_context=inference_context, **kwargs)
        if self._is_first:
            token_ids_T = token_ids_1T[0]
            hidden_TC = torch.empty(len(token_ids_T), self._hidden_size, dtype=torch.bfloat16)
        else:
            token_ids_T, hidden_TC = None, self._block.input_tensor[:, 0].contiguous()
        decoder = self.decoder
        logit_rows_R = batch.logit_rows if self._is_last else None
        if batch.before_layer is None:
            logits_RV = decoder.run(
                hidden_TC,
                batch.plan,
                batch.kv_layers,
                batch.rotation,
                token_ids_T=token_ids_T,
                logit_rows_R=logit_rows_R,
            )
        else:
            logits_RV = None
            for index in range(decoder.num_layers):
                batch.before_layer()
                logits_RV = decoder.run(
                    hidden_TC,
                    batch.plan,
                    batch.kv_layers,
                    batch.rotation,
                    token_ids_T=token_ids_T if index == 0 else None,
                    logit_rows_R=logit_rows_R if index == decoder.num_layers - 1 else None,
                    layers=range(index, index + 1),
                )
        if logits_RV is None:
            return hidden_TC.unsqueeze(1)
        if batch.hidden_rows is not None:
            batch.hidden = self._block.final_layernorm(hidden_TC.index_select(0, batch.hidden_rows))
        return logits_RV.unsqueeze(0)


def _decoder_of(model: GPTModel) -> NativeDecoder:
    """The same weights in a native decoder. Raises _UnsupportedPart."""
    config = model.config
    layers = [_layer_of(layer) for layer in model.decoder.layers]
    if not layers:
        raise _UnsupportedPart("a stage without layers")
    first = model.decoder.layers[0]
    embedding = None
    if model.pre_process:
        embedding = model.embedding.word_embeddings.weight
        if embedding.dtype != torch.bfloat16 or not embedding.is_contiguous():
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
        scale=first.self_attention.core_attention.scale,
    )
    return NativeDecoder(sizes, layers, embedding, output)


def _layer_of(layer: torch.nn.Module) -> LayerWeights:
    if type(layer) is not MedhaTransformerLayer or type(layer.mlp) is not MLP:
        raise _UnsupportedPart(f"a layer that is a {type(layer).__name__} with a {type(layer.mlp).__name__}")
    attention = layer.self_attention
    has_qk_norm = layer.config.qk_layernorm
    for linear in (attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
        if linear.bias is not None:
            raise _UnsupportedPart("a bias where Llama's family has none")
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
    if not isinstance(norm.forward, NativeRMSNorm) or norm.weight.dtype != torch.bfloat16:
        raise _UnsupportedPart(f"a norm that is a {type(norm).__name__} in {norm.weight.dtype}")
    assert isinstance(norm.weight, Tensor)
    return norm.weight


def _linear_of(linear: ColumnParallelLinear | RowParallelLinear) -> NativeLinear:
    packed = linear.forward
    if not isinstance(packed, PackedLinear) or not isinstance(packed.multiply, NativeLinear):
        raise _UnsupportedPart("linear layers that are not native ones on a single tensor-parallel rank")
    return packed.multiply
