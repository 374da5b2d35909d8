"""A whole step of a bf16 decoder in one native call: the Python side of native/decoder.cpp.

Called one by one from Python, the functions of a decode step of a small model take less time than the way to them.

Shapes: T tokens, R rows of logits, C hidden size, V outputs, D head dim, K key/value heads, G query heads of each.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_medha.kernels.attention.backend import LayerKV
from megatron_medha.kernels.attention.native_attention import ROW_FIELDS, NativePlan, pool_width
from megatron_medha.kernels.linear.native_experts import NativeExperts
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.linear.native_pointwise import NativeActivation, NativeNorm
from megatron_medha.kernels.native_build import native_library
from megatron_medha.kernels.native_structs import native_struct

_DenseMlp, _DecoderLayer, _DecoderCall = map(native_struct, ("DenseMlp", "DecoderLayer", "DecoderCall"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSizes:
    """What all layers share."""

    hidden_size: int
    num_kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    num_rotated: int  # numbers of a head that angles are given for
    scale: float


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """A dense MLP."""

    up: NativeLinear  # with a gate both halves
    down: NativeLinear
    activation: NativeActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's weights. It has an MLP, or experts, beside which the MLP is one that every token goes through."""

    attention_norm: NativeNorm
    mlp_norm: NativeNorm
    q_norm: NativeNorm | None  # of each head
    k_norm: NativeNorm | None
    qkv: NativeLinear  # outputs: for each key/value head its queries, its key, its value
    proj: NativeLinear
    mlp: MlpWeights | None
    experts: NativeExperts | None = None
    shared_gate: NativeLinear | None = None  # of one output, whose sigmoid weighs that of the MLP beside experts
    is_rotated: bool = True
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    """Rows of tokens, and of positions where they are learned; bf16."""

    of_tokens_VC: Tensor
    of_positions_PC: Tensor | None = None


@dataclass(frozen=True, slots=True)
class OutputWeights:
    """What turns hidden states into logits."""

    norm: NativeNorm
    linear: NativeLinear


class NativeDecoder:
    """Layers of one pipeline stage, before them the embedding on the first, behind them the output on the last."""

    def __init__(
        self,
        sizes: DecoderSizes,
        layers: Sequence[LayerWeights],
        embedding: EmbeddingWeights | None,
        output: OutputWeights | None,
        target: str | None = None,
    ) -> None:
        """Keeps the weights and reads them where they lie. target: as for `native_library`, which may raise.

        Raises ValueError for weights that do not fit one another.
        """
        self._run = native_library(target).medha_decoder
        self._sizes, self._layers, self._embedding, self._output = sizes, tuple(layers), embedding, output
        self._size_fields = asdict(sizes)  # named as those of DecoderCall, but for one
        self._size_fields["angle_width"] = self._size_fields.pop("num_rotated")
        self._check()
        self._kv_layers: Sequence[LayerKV] = ()
        self._decode_call: ctypes.Structure | None = None
        self._decoded: tuple[Tensor, Tensor] = torch.empty(0), torch.empty(0)  # its hidden states and logits
        self._table = (_DecoderLayer * len(layers))()
        for row, layer in zip(self._table, layers, strict=True):
            row.attention_norm, row.mlp_norm = layer.attention_norm.struct, layer.mlp_norm.struct
            if layer.q_norm is not None and layer.k_norm is not None:
                row.q_norm, row.k_norm = layer.q_norm.struct, layer.k_norm.struct
            row.qkv, row.proj = layer.qkv.weight, layer.proj.weight
            if (mlp := layer.mlp) is not None:
                row.mlp = _DenseMlp(mlp.up.weight, mlp.down.weight, mlp.down.num_inputs, mlp.activation.struct)
            if layer.experts is not None:
                row.experts = ctypes.addressof(layer.experts.struct)
            if layer.shared_gate is not None:
                row.shared_gate = layer.shared_gate.weight
            row.num_rotated = sizes.num_rotated if layer.is_rotated else 0
            row.is_interleaved = layer.is_interleaved

    @property
    def num_layers(self) -> int:
        """Of this stage."""
        return len(self._layers)

    @property
    def num_outputs(self) -> int:
        """V; 0 without an output layer."""
        return 0 if self._output is None else self._output.linear.num_outputs

    def run(
        self,
        hidden_TC: Tensor,
        plan: NativePlan,
        kv_layers: Sequence[LayerKV],
        angles: tuple[Tensor, Tensor],
        *,
        token_ids_T: Tensor | None = None,
        positions_T: Tensor | None = None,
        logit_rows_R: Tensor | None = None,
        layers: range | None = None,
    ) -> Tensor | None:
        """Run `layers` (all by default) over a batch: hidden_TC, bf16, is overwritten with what the last one leaves.

        token_ids_T: int64, valid ones; hidden_TC is filled with their embeddings first. positions_T: int64, where they
        are learned. logit_rows_R: int64, rows whose logits [R, V] come back. angles: cosines and signed sines
        [T, numbers that turn], fp32. plan and kv_layers: of NativeAttention.
        Raises ValueError for what does not fit.
        """
        sizes, num_tokens = self._sizes, len(hidden_TC)
        cos_TD, _ = angles
        if hidden_TC.dtype != torch.bfloat16 or hidden_TC.shape[1] != sizes.hidden_size:
            raise ValueError(f"hidden states {hidden_TC.dtype} {tuple(hidden_TC.shape)} for size {sizes.hidden_size}")
        if cos_TD.shape != (num_tokens, sizes.num_rotated) or cos_TD.dtype != torch.float32:
            raise ValueError(f"angles {cos_TD.dtype} {tuple(cos_TD.shape)} for {num_tokens} x {sizes.num_rotated}")
        if plan.slots is None or not plan.is_all_written or len(plan.slots) != num_tokens:
            raise ValueError(f"the plan does not write the {num_tokens} tokens of the batch")
        layers = range(len(self._layers)) if layers is None else layers
        logits_RV = None
        if logit_rows_R is not None:
            logits_RV = torch.empty(len(logit_rows_R), self.num_outputs, dtype=torch.bfloat16)
        call = self._call(layers, kv_layers, angles, hidden_TC, logits_RV)
        call.num_threads, call.num_tokens = plan.num_threads, num_tokens
        call.token_ids = None if token_ids_T is None else token_ids_T.data_ptr()
        if token_ids_T is not None and call.position_embedding is not None:
            if positions_T is None or positions_T.dtype != torch.int64 or len(positions_T) != num_tokens:
                raise ValueError(f"no positions for {num_tokens} tokens of a model that has learned them")
            call.positions = positions_T.data_ptr()
        call.slots, call.rows, call.num_rows = plan.slots.ctypes.data, plan.rows.ctypes.data, len(plan.rows)
        if logit_rows_R is not None:
            call.num_logit_rows, call.logit_rows = len(logit_rows_R), logit_rows_R.data_ptr()
        if self._run(ctypes.byref(call)):
            raise MemoryError("the decoder library could not allocate its working memory")
        return logits_RV

    def decode(
        self, numbers: array[int], num_tokens: int, kv_layers: Sequence[LayerKV], table: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One token each of T sequences through a whole model: logits [T, V], which the next call overwrites.

        For steps of decodes alone: what `run` builds for each step takes longer than anything else outside of the
        library, since a step's weights have driven it out of the caches. Here the call is kept, and all numbers come in
        one array of int64: token ids [T], positions [T], slots [T], rows [T, ROW_FIELDS] as in NativePlan, 0 to T - 1.

        table: cosines and signed sines by position, fp32, longer than any position. No number is looked at here.
        """
        expected = (4 + ROW_FIELDS) * num_tokens
        assert len(numbers) == expected and num_tokens, f"{len(numbers)} numbers for {num_tokens} tokens"
        call = self._decode_call
        if call is None or len(self._decoded[0]) < num_tokens or kv_layers is not self._kv_layers:
            hidden_TC = torch.empty(num_tokens, self._sizes.hidden_size, dtype=torch.bfloat16)
            self._decoded = hidden_TC, torch.empty(num_tokens, self.num_outputs, dtype=torch.bfloat16)
            layers = range(len(self._layers))
            call = self._decode_call = self._call(layers, kv_layers, table, *self._decoded)
        call.num_threads = torch.get_num_threads()
        call.num_tokens = call.num_rows = call.num_logit_rows = num_tokens
        first, _ = numbers.buffer_info()
        size = num_tokens * numbers.itemsize
        call.token_ids, call.angle_rows, call.slots = first, first + size, first + 2 * size
        call.positions = call.angle_rows
        call.rows, call.logit_rows = first + 3 * size, first + (3 + ROW_FIELDS) * size
        if self._run(ctypes.byref(call)):
            raise MemoryError("the decoder library could not allocate its working memory")
        return self._decoded[1][:num_tokens]

    def _call(
        self,
        layers: range,
        kv_layers: Sequence[LayerKV],
        angles: tuple[Tensor, Tensor],
        hidden_TC: Tensor,
        logits_RV: Tensor | None,
    ) -> ctypes.Structure:
        """Everything but the batch itself."""
        self._take_pools(kv_layers)
        sizes, output, embedding, (cos, signed_sin) = self._sizes, self._output, self._embedding, angles
        assert cos.shape == signed_sin.shape and cos.shape[1] == sizes.num_rotated and cos.dtype == torch.float32
        assert hidden_TC.is_contiguous() and cos.is_contiguous() and signed_sin.is_contiguous()
        call = _DecoderCall(
            **self._size_fields,
            layers=ctypes.addressof(self._table) + layers.start * ctypes.sizeof(_DecoderLayer),
            num_layers=len(layers),
            pool_head_stride=kv_layers[0].k.stride(0),
            embedding=None if embedding is None else embedding.of_tokens_VC.data_ptr(),
            hidden=hidden_TC.data_ptr(),
            cos=cos.data_ptr(),
            signed_sin=signed_sin.data_ptr(),
        )
        if embedding is not None and embedding.of_positions_PC is not None:
            call.position_embedding = embedding.of_positions_PC.data_ptr()
        if logits_RV is not None:
            assert output is not None, "this stage has no output layer"
            call.final_norm, call.output = output.norm.struct, output.linear.weight
            call.num_outputs, call.logits = self.num_outputs, logits_RV.data_ptr()
        return call

    def _take_pools(self, kv_layers: Sequence[LayerKV]) -> None:
        """Note where keys and values lie; every step brings the same ones."""
        if kv_layers is self._kv_layers:
            return
        shape = (self._sizes.num_kv_heads, pool_width(self._sizes.head_dim))
        assert len(kv_layers) == len(self._table), f"KV of {len(kv_layers)} layers for {len(self._table)}"
        for row, layer in zip(self._table, kv_layers, strict=True):
            if layer.k.dtype != torch.bfloat16 or (layer.k.shape[0], layer.k.shape[2]) != shape:
                raise ValueError(f"a pool {layer.k.dtype} {tuple(layer.k.shape)} for heads and width {shape}")
            row.k_pool, row.v_pool = layer.k.data_ptr(), layer.v.data_ptr()
        self._kv_layers = kv_layers

    def _check(self) -> None:
        sizes = self._sizes
        heads, hidden = sizes.num_kv_heads * sizes.queries_per_kv_head, sizes.hidden_size
        for layer in self._layers:
            linears = [
                (layer.qkv, hidden, (heads + 2 * sizes.num_kv_heads) * sizes.head_dim),
                (layer.proj, heads * sizes.head_dim, hidden),
            ]
            if (mlp := layer.mlp) is not None:
                ffn_size = mlp.down.num_inputs
                linears += [(mlp.up, hidden, ffn_size * (1 + mlp.activation.has_gate)), (mlp.down, ffn_size, hidden)]
            if layer.shared_gate is not None:
                linears.append((layer.shared_gate, hidden, 1))
            for linear, num_inputs, num_outputs in linears:
                if (linear.num_inputs, linear.num_outputs) != (num_inputs, num_outputs):
                    raise ValueError(
                        f"a layer {linear.num_inputs} -> {linear.num_outputs} instead of {num_inputs} -> {num_outputs}"
                    )
            norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            for norm, size in zip(norms, (hidden,) * 2 + (sizes.head_dim,) * 2, strict=True):
                if norm is not None and norm.width != size:
                    raise ValueError(f"a norm of width {norm.width} instead of {size}")
            if layer.mlp is None and layer.experts is None:
                raise ValueError("a layer with neither MLP nor experts")
            if layer.experts is not None and layer.experts.hidden_size != hidden:
                raise ValueError(f"experts of {layer.experts.hidden_size} inputs instead of {hidden}")
        table = None if self._embedding is None else self._embedding.of_positions_PC
        if table is not None and (table.dtype != torch.bfloat16 or table.shape[1] != hidden):
            raise ValueError(f"positions {table.dtype} {tuple(table.shape)} for size {hidden}")
