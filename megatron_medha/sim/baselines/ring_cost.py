"""How long prefills and decodes take when several instances of a model share the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

from megatron_medha.core.cost.hardware import Hardware, send_s
from megatron_medha.core.cost.step_cost import CostModel
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCost:
    """Striped ring attention over instances that are each a tensor-parallel group.

    Every instance holds a stripe of the tokens, so causal attention is balanced; in each layer the K and V of one
    stripe go round the ring while attention over the last one runs, and the slower of the two is what a hop takes.
    Sources: Ring Attention (arXiv:2310.01889), Striped Attention (arXiv:2311.09431), LoongServe (arXiv:2404.09526).
    Assumed by default: no load imbalance, perfect overlap, K and V of GQA heads only. The first rings had none of the
    three: with contiguous parts (is_striped=False) some instance has a full block of pairs in every hop but its own,
    which takes all as long; without overlap a hop is sent, then computed; sent_heads=num_heads repeats K and V.

    instance: the cost of one instance, alone; tp: its devices.
    """

    instance: CostModel
    shape: ModelShape
    hardware: Hardware
    tp: int
    is_striped: bool = True
    overlaps: bool = True
    sent_heads: int | None = None  # None: num_kv_heads

    def prefill_s(self, num_instances: int, num_tokens: int, square_sum: float, num_sequences: int) -> float:
        """Seconds of one pass over whole prompts; square_sum: of their lengths, since attention pairs add up so."""
        stripe_tokens = -(-num_tokens // num_instances)
        linear_s = self.instance.linear_s(stripe_tokens, num_sequences)
        attention_s = self.instance.attention_s(0, round(sqrt(square_sum)))
        if num_instances == 1:
            return linear_s + attention_s
        own_s = attention_s / num_instances**2  # causal pairs of an instance's own part
        hop_attention_s = own_s if self.is_striped else 2.0 * own_s
        sent_s = self.hop_send_s(num_instances, stripe_tokens)
        hop_s = max(hop_attention_s, sent_s) if self.overlaps else hop_attention_s + sent_s
        return linear_s + own_s + (num_instances - 1) * hop_s

    def prompts_s(self, num_instances: int, prompts: Sequence[Request]) -> float:
        """The same of the prompts themselves; infinite on no instances."""
        if not num_instances:
            return inf
        lengths = [request.num_prompt_tokens for request in prompts]
        squares = sum(float(length) ** 2 for length in lengths)
        return self.prefill_s(num_instances, sum(lengths), squares, len(lengths))

    def decode_s(self, num_instances: int, num_masters: int, num_sequences: int, longest_context: int) -> float:
        """Seconds of one token for every sequence.

        num_masters: instances that share the linear work; the others attend to the KV they hold, for which the
        queries go out and partial results come back. longest_context: keys on the instance that holds most.
        """
        per_master = -(-num_sequences // num_masters)
        merge_s = 0.0
        if num_instances > 1:
            merge_s = self.shape.num_layers * 2 * self.hardware.link(num_instances * self.tp).latency_s
        attention_s = self.instance.decode_attention_s(longest_context)
        return self.instance.linear_s(per_master, per_master) + attention_s + merge_s

    def migration_s(self, num_tokens: int) -> float:
        """Seconds to move the KV of so many tokens to another instance, all accelerators of an instance sending."""
        num_bytes = num_tokens * self.shape.kv_bytes_per_token / self._kv_parts
        return send_s(self.hardware.inter_node, num_bytes)

    def hop_send_s(self, num_instances: int, stripe_tokens: int) -> float:
        """One hop of all layers, over the slowest link of the ring."""
        link = self.hardware.link(num_instances * self.tp)
        num_bytes = stripe_tokens * self.shape.kv_bytes_per_token / self._kv_parts
        if self.sent_heads is not None:
            num_bytes *= self.sent_heads / self.shape.num_kv_heads
        return send_s(link, num_bytes) + (self.shape.num_layers - 1) * link.latency_s

    @property
    def _kv_parts(self) -> int:
        return min(self.tp, self.shape.num_kv_heads)
