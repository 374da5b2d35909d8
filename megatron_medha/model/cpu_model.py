"""A model as a CPU runs it: packed weights, native norms and activations, and whole steps in one call of the library.

What of it this model can have on this machine is settled at load, for all steps. Then there are three ways:
decodes of a whole model go straight to the decoder (worker/plain_decodes.py); other steps go through the model's
forward, which is the decoder's call where there is one; steps with rows shared among kvp ranks go through the model's
own layers and the kernels put into them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.linear.native_decoder import (
    DecoderSizes,
    EmbeddingWeights,
    LayerWeights,
    NativeDecoder,
    OutputWeights,
)
from megatron_medha.kernels.linear.native_experts import NativeExperts
from megatron_medha.kernels.linear.native_pointwise import NativeNorm
from megatron_medha.kernels.native_build import NativeUnavailable
from megatron_medha.model.attention import MedhaSelfAttention
from megatron_medha.model.experts import ExpertsLayer
from megatron_medha.model.general_layers import (
    GeneralCoreAttention,
    GeneralSelfAttention,
    GeneralTransformerLayer,
    WideNorm,
)
from megatron_medha.model.inference_context import PackedBatch
from megatron_medha.model.layer import MedhaTransformerLayer
from megatron_medha.model.native_parts import (
    UnsupportedPart,
    linear_of,
    mlp_of,
    norm_of,
    pack_routers,
    shared_gate_of,
    use_native_parts,
)
from megatron_medha.model.packed_linear import pack_linears

log = logging.getLogger(__name__)


def use_cpu_kernels(
    model: GPTModel,
    backend: AttentionBackend,
    sum_over_tp: Callable[[Tensor], object] | None = None,
    *,
    weight_dtype: str = "auto",
    linear_backend: str = "auto",
    virtual_tp: int = 1,
) -> NativeDecoder | None:
    """Put into the model what a CPU can have; inference only, for good. Returns the decoder of whole steps, if any.

    For the arguments see pack_linears. Says in the log what is used and why the rest is not.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    pack_linears(
        model, sum_over_tp, weight_dtype=weight_dtype, linear_backend=linear_backend, virtual_tp=virtual_tp
    )
    for module in model.modules():
        if isinstance(module, ExpertsLayer | WideNorm) and module.sum_over_tp is not None and sum_over_tp is not None:
            module.sum_over_tp = sum_over_tp
        if isinstance(module, ExpertsLayer):
            module.has_slices = virtual_tp > 1
        if isinstance(module, WideNorm):
            module.num_slices = max(1, virtual_tp // module.num_ranks)
    try:
        use_native_parts(model)
        decoder = _decoder_of(model, backend)
    except (UnsupportedPart, NativeUnavailable) as reason:
        log.info("decode=torch reason=%r (docs/models.md: which models have native decodes)", str(reason))
        return None
    finally:
        pack_routers(model)
    forward = NativeForward(model, decoder, backend)
    model.forward = forward  # type: ignore[method-assign]
    log.info("decode=native layers=%d calls=%d", decoder.num_layers, len(forward.runs))
    # A call has one plan of what its rows see.
    return None if any(run.is_windowed for run in forward.runs) else decoder


class LayerRun(NamedTuple):
    """Layers one after another that all have the window, or all have not."""

    layers: range
    is_windowed: bool


def layer_runs(is_windowed: Sequence[bool]) -> tuple[LayerRun, ...]:
    """Of layers that have the window or not, in order."""
    starts = [i for i, has in enumerate(is_windowed) if i == 0 or has != is_windowed[i - 1]]
    ends = [*starts[1:], len(is_windowed)]
    return tuple(LayerRun(range(i, end), is_windowed[i]) for i, end in zip(starts, ends, strict=True))


class NativeForward:
    """Stands in for the forward of a GPTModel. Batches with rows shared among kvp ranks take the model's own."""

    def __init__(self, model: GPTModel, decoder: NativeDecoder, backend: AttentionBackend) -> None:
        self.decoder = decoder
        self._backend = backend
        self.plain = model.forward
        self._block = model.decoder
        self._is_first, self._is_last = model.pre_process, model.post_process
        self._hidden_size = model.config.hidden_size
        attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
        self.runs = layer_runs([getattr(attention, "is_windowed", False) for attention in attentions])

    def __call__(
        self, token_ids_1T: Tensor, *args: Any, inference_context: PackedBatch | None = None, **kwargs: Any
    ) -> Tensor:
        """As GPTModel's: [1, R, V] on the last stage, hidden states [T, 1, C] before."""
        batch = inference_context
        if batch is None:
            return self.plain(token_ids_1T, *args, inference_context=None, **kwargs)
        if batch.shared is not None:
            return self.plain(token_ids_1T, *args, inference_context=inference_context, **kwargs)
        if self._is_first:
            token_ids_T = token_ids_1T[0]
            hidden_TC = torch.empty(len(token_ids_T), self._hidden_size, dtype=torch.bfloat16)
        else:
            token_ids_T, hidden_TC = None, self._block.input_tensor[:, 0].contiguous()
        num_layers, runs, held = self.decoder.num_layers, self.runs, batch.held
        # Ranks that compute nothing together still agree on a step's order with others that do: at its points.
        agrees = held is not None and not held.is_alone
        if agrees or batch.before_layer is not None:
            runs = tuple(LayerRun(range(i, i + 1), run.is_windowed) for run in runs for i in run.layers)
        logits_RV = None
        for layers, is_windowed in runs:
            if batch.before_layer is not None:
                batch.before_layer()
            is_last = self._is_last and layers.stop == num_layers
            with nullcontext() if held is None else self._backend.looking(held.points):
                logits_RV = self.decoder.run(
                    hidden_TC,
                    batch.window_plan if is_windowed else batch.plan,
                    batch.kv_layers,
                    batch.rotation[:2],
                    token_ids_T=token_ids_T if layers.start == 0 else None,
                    positions_T=batch.positions_T,
                    logit_rows_R=batch.logit_rows if is_last else None,
                    layers=layers,
                )
            if held is not None and agrees:
                held.points.agree(held.num_blocks)
        if not self._is_last:
            return hidden_TC.unsqueeze(1)
        assert logits_RV is not None
        if batch.hidden_rows is not None:
            batch.hidden = self._block.final_layernorm(hidden_TC.index_select(0, batch.hidden_rows))
        return logits_RV.unsqueeze(0)


def _decoder_of(model: GPTModel, backend: AttentionBackend) -> NativeDecoder:
    """The same weights in a native decoder. Raises UnsupportedPart."""
    if not backend.is_native:
        raise UnsupportedPart(f"attention_backend={backend.name}")
    config = model.config
    layers = [_layer_of(layer) for layer in model.decoder.layers]
    if not layers:
        raise UnsupportedPart("a stage without layers")
    embedding = _embedding_of(model) if model.pre_process else None
    output = None
    if model.post_process:
        output = OutputWeights(norm_of(model.decoder.final_layernorm), linear_of(model.output_layer))
    attention = model.decoder.layers[0].self_attention.core_attention
    sizes = DecoderSizes(
        hidden_size=config.hidden_size,
        num_kv_heads=config.num_query_groups,
        queries_per_kv_head=config.num_attention_heads // config.num_query_groups,
        head_dim=config.kv_channels,
        num_rotated=attention.num_rotated if isinstance(attention, GeneralCoreAttention) else config.kv_channels,
        scale=attention.scale,
    )
    return NativeDecoder(sizes, layers, embedding, output)


def _embedding_of(model: GPTModel) -> EmbeddingWeights:
    of_tokens_VC = model.embedding.word_embeddings.weight
    of_positions_PC = model.embedding.position_embeddings.weight if model.embedding.add_position_embedding else None
    for table in (of_tokens_VC, of_positions_PC):
        if table is not None and (table.dtype != torch.bfloat16 or not table.is_contiguous()):
            raise UnsupportedPart(f"an embedding in {table.dtype}")
    return EmbeddingWeights(of_tokens_VC, of_positions_PC)


def _layer_of(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attention, layer.mlp
    kinds = (type(layer), type(attention))
    if kinds == (GeneralTransformerLayer, GeneralSelfAttention):
        is_rotated, is_interleaved = _rotation_of(attention)
    elif kinds == (MedhaTransformerLayer, MedhaSelfAttention):
        is_rotated, is_interleaved = True, False
    else:
        raise UnsupportedPart(f"a layer that is a {kinds[0].__name__} with a {kinds[1].__name__}")
    parts: dict[str, Any] = {"mlp": None}
    if isinstance(mlp, ExpertsLayer):
        if not isinstance(mlp.routed, NativeExperts) or mlp.sum_over_tp is not None:
            raise UnsupportedPart("experts that are not native ones on a single tensor-parallel rank")
        parts["experts"] = mlp.routed
        if mlp.shared_experts is not None:
            parts |= {"mlp": mlp_of(mlp.shared_experts), "shared_gate": shared_gate_of(mlp.shared_experts)}
    elif type(mlp) is MLP:
        parts["mlp"] = mlp_of(mlp)
    else:
        raise UnsupportedPart(f"a layer with a {type(mlp).__name__}")
    return LayerWeights(
        attention_norm=norm_of(layer.input_layernorm),
        mlp_norm=norm_of(layer.pre_mlp_layernorm),
        q_norm=_head_norm_of(attention.q_layernorm),
        k_norm=_head_norm_of(attention.k_layernorm),
        qkv=linear_of(attention.linear_qkv),
        proj=linear_of(attention.linear_proj),
        is_rotated=is_rotated,
        is_interleaved=is_interleaved,
        **parts,
    )


def _rotation_of(attention: GeneralSelfAttention) -> tuple[bool, bool]:
    """Whether queries and keys are turned, and whether neighbours are. Raises UnsupportedPart for what is not here."""
    core = attention.core_attention
    unsupported = {
        "an output gate of attention": attention.config.attention_output_gate,
        "scores beside those of keys": core.softmax_offset is not None,
    }
    if named := [name for name, is_set in unsupported.items() if is_set]:
        raise UnsupportedPart(", ".join(named))
    return core.is_rotated, core.is_interleaved


def _head_norm_of(norm: torch.nn.Module | None) -> NativeNorm | None:
    return None if norm is None or isinstance(norm, IdentityOp) else norm_of(norm)
