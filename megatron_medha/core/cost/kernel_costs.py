"""How long the kernels of a model take on one rank: products, what is between them, attention. No host, no pipeline."""

from __future__ import annotations

from math import ceil, sqrt

from megatron_medha.core.cost.hardware import Hardware, all_reduce_s
from megatron_medha.core.model_shape import ModelShape

ACTIVATION_BYTES = 2  # 16-bit activations, whatever the weights are
_DENSE_KERNELS = 10   # of a layer besides attention: 4 products, 2 norms, rotation, activation, 2 sums
_MOE_KERNELS = 14     # a router, a choice, a gather and a weighted sum more


class LinearKernels:
    """All of a layer but attention, and the output head, cut `tp` ways.

    A product takes sqrt(compute^2 + memory^2), the two terms of the roofline joined smoothly: with 100 to 500 tokens,
    where both are of a size, it reaches neither limit. Fitted to measured layers of 8 to 4,096 tokens (Llama 8B and 70B
    cut 8 ways) this is within 10% on A100 and 7% on H100; the larger of the two terms gets to 14% and 6% at best.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware, tp: int) -> None:
        self._shape = shape
        self._is_dense = shape.num_experts == 1
        flops_per_s = hardware.matmul_flops_per_s(shape.bytes_per_element) * hardware.linear_efficiency
        memory_bytes_per_s = hardware.memory_bytes_per_s * hardware.memory_efficiency
        self._layer_token_s = 2 * shape.num_active_layer_params / tp / flops_per_s
        self._head_row_s = 2 * shape.num_head_params / tp / flops_per_s
        self._param_read_s = shape.bytes_per_element / tp / memory_bytes_per_s
        self._dense_read_s = shape.num_layer_params * self._param_read_s
        self._head_read_s = shape.num_head_params * self._param_read_s + hardware.kernel_overhead_s
        # Read and written besides weights: two norms (2 tensors each) and two sums (3 each) of the hidden state, which
        # every tp rank does in full; gate, up and their product; rotation of the queries (2 in, 2 out).
        widths = 10 * shape.hidden_size + 4 * shape.num_heads * shape.head_dim / tp
        widths += shape.num_mlp_numbers / tp
        if not self._is_dense:
            widths += 4 * shape.hidden_size * shape.num_experts_per_token  # tokens to their experts and back
        link = hardware.link(tp)
        reduce_fixed_s = 2 * all_reduce_s(link, tp, 0.0)  # after attention and after the MLP
        reduce_token_s = 2 * all_reduce_s(link, tp, shape.hidden_size * ACTIVATION_BYTES) - reduce_fixed_s
        num_kernels = _DENSE_KERNELS if self._is_dense else _MOE_KERNELS
        self._fixed_s = num_kernels * hardware.kernel_overhead_s + reduce_fixed_s
        self._beside_token_s = widths * ACTIVATION_BYTES / memory_bytes_per_s + reduce_token_s

    def layer_s(self, num_tokens: int) -> float:
        """One layer, its two all-reduces over tp included."""
        compute_s = num_tokens * self._layer_token_s
        read_s = self._dense_read_s
        if not self._is_dense:
            read_s = self._shape.num_touched_layer_params(num_tokens) * self._param_read_s
        return sqrt(compute_s * compute_s + read_s * read_s) + num_tokens * self._beside_token_s + self._fixed_s

    def head_s(self, num_rows: int) -> float:
        """The output head for so many rows."""
        compute_s = num_rows * self._head_row_s
        return sqrt(compute_s * compute_s + self._head_read_s * self._head_read_s)


class AttentionKernels:
    """Attention over all layers, heads cut `tp` ways.

    A chunk takes sqrt(compute^2 + memory^2) as well. Against Llama 70B's 1M tokens on 8 H100: chunks of 32 take 1.10
    times as long as chunks of 2,048, as published; chunks of 64 1.03 times (published: 1.035).

    tile_rows: a kernel that does not split keys gives tiles of so many queries of one head to one processor each, and
    leaves the others idle, or takes another round, where tiles are few; None: keys are split too, none is idle.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware, tp: int, tile_rows: int | None) -> None:
        # A rank holds num_cached_heads / tp of them, but never less than one: further ranks repeat it.
        kv_ranks = min(tp, shape.num_cached_heads)
        self._key_read_s = (
            shape.kv_bytes_per_token / kv_ranks / (hardware.memory_bytes_per_s * hardware.memory_efficiency)
        )
        # Scores and values are multiplied in 16 bits even when KV is stored in 8.
        row_flops = 4 * shape.cached_dim * shape.num_layers  # of one query of one head, per key
        self._heads = shape.num_heads // tp
        self._pair_s = row_flops * self._heads / (hardware.flops_per_s * hardware.attention_efficiency)
        self._num_sms = hardware.num_sms
        self._tile_rows = tile_rows
        lone_flops_per_s = hardware.flops_per_s / hardware.num_sms * hardware.lone_tile_efficiency
        self._tile_key_s = (tile_rows or 0) * row_flops / lone_flops_per_s

    def chunk_s(self, start: int, num_tokens: int) -> float:
        """A chunk after `start` tokens, causal."""
        num_keys = start + 0.5 * (num_tokens + 1)  # that a query attends to, on average
        compute_s = num_tokens * num_keys * self._pair_s
        if self._tile_rows is not None:
            rounds = ceil(-(-num_tokens // self._tile_rows) * self._heads / self._num_sms)
            compute_s = max(compute_s, rounds * num_keys * self._tile_key_s)
        read_s = (start + num_tokens) * self._key_read_s
        return sqrt(compute_s * compute_s + read_s * read_s)

    def decode_s(self, context: int) -> float:
        """Single tokens that read `context` keys in all; one query per key is bound by memory on every machine."""
        return context * self._key_read_s
