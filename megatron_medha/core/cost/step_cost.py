"""How long a step will take: the protocol, and the roofline that is known before anything has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_medha.core.cost.hardware import Hardware as Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape


@dataclass(slots=True)
class StepLoad:
    """What one KVP rank has to compute in a step, as sums over its chunks. Contexts are local to the rank's shard."""

    num_tokens: int = 0
    num_sequences: int = 0
    chunk_pairs: float = 0.0   # query-key pairs of chunks longer than one token, causal
    chunk_context: int = 0     # keys read by those chunks
    decode_context: int = 0    # keys read by single tokens
    attention_s: float = 0.0   # the cost model's own sum over the chunks

    def add_chunk(self, start: int, num_tokens: int, attention_s: float) -> None:
        """Add a chunk of `num_tokens` after `start` tokens of context."""
        self.num_tokens += num_tokens
        self.num_sequences += 1
        self.attention_s += attention_s
        self.chunk_pairs += num_tokens * (start + 0.5 * (num_tokens + 1))
        self.chunk_context += start + num_tokens

    def remove_chunk(self, start: int, num_tokens: int, attention_s: float) -> None:
        """Take out what add_chunk put in."""
        self.num_tokens -= num_tokens
        self.num_sequences -= 1
        self.attention_s -= attention_s
        self.chunk_pairs -= num_tokens * (start + 0.5 * (num_tokens + 1))
        self.chunk_context -= start + num_tokens

    def add_decodes(self, num_sequences: int, context: int, attention_s: float) -> None:
        """Add single tokens that read `context` keys in all."""
        self.num_tokens += num_sequences
        self.num_sequences += num_sequences
        self.attention_s += attention_s
        self.decode_context += context


class CostModel(Protocol):
    """Predicted seconds; a step is its linear part plus the attention of its chunks."""

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """Everything but attention: fixed costs, matrix products, collectives, sampling."""

    def attention_s(self, start: int, num_tokens: int) -> float:
        """Attention of one chunk after `start` tokens of context, over all layers of the pipeline."""

    def decode_attention_s(self, context: int) -> float:
        """Attention of single tokens that read `context` keys in all, over all layers of the pipeline."""

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """Learn from a step that has run; a model that cannot learn does nothing."""

    @property
    def revision(self) -> int:
        """Changes when predictions have changed enough for tables built from them to be built again."""


def step_s(cost: CostModel, load: StepLoad) -> float:
    """Predicted seconds of a step on one KVP rank."""
    return cost.linear_s(load.num_tokens, load.num_sequences) + load.attention_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    """max(FLOPs / peak, bytes / bandwidth), from the model's shape and the hardware's data sheet.

    Linear: 2 FLOPs per weight and token against one read of all weights. Attention: 4 * cached_dim * num_heads
    FLOPs per query-key pair and layer against one read of the chunk's K and V, causal.
    """

    shape: ModelShape
    hardware: Hardware
    layout: ParallelLayout = ParallelLayout()

    def linear_s(self, num_tokens: int, num_sequences: int) -> float:
        """See CostModel."""
        shape, hardware, tp = self.shape, self.hardware, self.layout.tp
        weights = shape.num_layers * shape.num_active_layer_params / tp
        head = shape.num_head_params / tp
        flops = 2 * (num_tokens * weights + num_sequences * head)
        touched = shape.num_layers * shape.num_touched_layer_params(num_tokens) / tp
        num_bytes = (touched + head) * shape.bytes_per_element
        return (
            hardware.step_overhead_s
            + shape.num_layers * hardware.layer_overhead_s
            + num_sequences * hardware.chunk_overhead_s
            + max(
                flops / (hardware.flops_per_s * hardware.linear_efficiency),
                num_bytes / (hardware.memory_bytes_per_s * hardware.memory_efficiency),
            )
        )

    def attention_s(self, start: int, num_tokens: int) -> float:
        """See CostModel."""
        shape, hardware, tp = self.shape, self.hardware, self.layout.tp
        pairs = num_tokens * (start + 0.5 * (num_tokens + 1))
        flops = 4 * pairs * shape.cached_dim * shape.num_heads * shape.num_layers / tp
        num_bytes = (start + num_tokens) * shape.kv_bytes_per_token / min(tp, shape.num_cached_heads)
        return max(
            flops / (hardware.flops_per_s * hardware.attention_efficiency),
            num_bytes / (hardware.memory_bytes_per_s * hardware.memory_efficiency),
        )

    def decode_attention_s(self, context: int) -> float:
        """See CostModel. One query per key is bound by memory on every machine."""
        shape, hardware = self.shape, self.hardware
        num_bytes = context * shape.kv_bytes_per_token / min(self.layout.tp, shape.num_cached_heads)
        return num_bytes / (hardware.memory_bytes_per_s * hardware.memory_efficiency)

    def observe(self, load: StepLoad, duration_s: float) -> None:
        """A roofline does not learn."""

    @property
    def revision(self) -> int:
        """Never changes."""
        return 0
