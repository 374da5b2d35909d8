"""How long prefills and decodes take when several instances of a model share the tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from megatron_medha.core.cost import CostModel
from megatron_medha.core.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What joins the accelerators of a cluster, each way and per accelerator."""

    node_bytes_per_s: float       # within a node
    network_bytes_per_s: float    # between nodes
    hop_s: float = 15e-6          # to start one send and receive: NCCL's latency for small messages
    efficiency: float = 0.8       # of the link's peak, reached by large messages


# Data sheets: NVLink 3 600 GB/s both ways and one 200 Gb/s port per GPU (NDm A100 v4); NVLink 4 900 GB/s both ways
# and one 400 Gb/s port per GPU (ND H100 v5).
A100_LINKS = Links(node_bytes_per_s=300e9, network_bytes_per_s=25e9)
H100_LINKS = Links(node_bytes_per_s=450e9, network_bytes_per_s=50e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCost:
    """Striped ring attention over instances that are each a tensor-parallel group.

    Every instance holds a stripe of the tokens, so causal attention is balanced; in each layer the K and V of one
    stripe go round the ring while attention over the last one runs, and the slower of the two is what a hop takes.
    Sources: Ring Attention (arXiv:2310.01889), Striped Attention (arXiv:2311.09431), LoongServe (arXiv:2404.09526).
    Assumed: no load imbalance, perfect overlap, K and V of GQA heads only (an implementation that repeats them to all
    heads would send num_heads / num_kv_heads times as much).

    instance: the cost of one instance, alone; tp: its accelerators; node_instances: those that share a node.
    """

    instance: CostModel
    shape: ModelShape
    links: Links
    tp: int
    node_instances: int

    def prefill_s(self, num_instances: int, num_tokens: int, square_sum: float, num_sequences: int) -> float:
        """Seconds of one pass over whole prompts; square_sum: of their lengths, since attention pairs add up so."""
        stripe_tokens = -(-num_tokens // num_instances)
        linear_s = self.instance.linear_s(stripe_tokens, num_sequences)
        attention_s = self.instance.attention_s(0, round(sqrt(square_sum)))
        if num_instances == 1:
            return linear_s + attention_s
        hop_attention_s = attention_s / num_instances**2
        hop_s = max(hop_attention_s, self._send_s(num_instances, stripe_tokens))
        return linear_s + hop_attention_s + (num_instances - 1) * hop_s

    def decode_s(self, num_instances: int, num_masters: int, num_sequences: int, longest_context: int) -> float:
        """Seconds of one token for every sequence.

        num_masters: instances that share the linear work; the others attend to the KV they hold, for which the
        queries go out and partial results come back. longest_context: keys on the instance that holds most.
        """
        per_master = -(-num_sequences // num_masters)
        merge_s = 0.0
        if num_instances > 1:
            merge_s = self.shape.num_layers * 2 * self.links.hop_s
        attention_s = self.instance.decode_attention_s(longest_context)
        return self.instance.linear_s(per_master, per_master) + attention_s + merge_s

    def migration_s(self, num_tokens: int) -> float:
        """Seconds to move the KV of so many tokens to another instance, all accelerators of an instance sending."""
        rate = self.links.network_bytes_per_s * self.links.efficiency * self.tp
        return num_tokens * self.shape.kv_bytes_per_token / rate

    def _send_s(self, num_instances: int, stripe_tokens: int) -> float:
        crosses_nodes = num_instances > self.node_instances
        bandwidth = self.links.network_bytes_per_s if crosses_nodes else self.links.node_bytes_per_s
        num_bytes = stripe_tokens * self.shape.kv_bytes_per_token / min(self.tp, self.shape.num_kv_heads)
        return num_bytes / (bandwidth * self.links.efficiency) + self.shape.num_layers * self.links.hop_s
