"""The shape of a dense decoder: the numbers that cost and memory follow from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense GQA decoder with gated MLP (Llama, Mistral and Qwen families)."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_len: int
    bytes_per_element: int = 2  # of weights and KV
    has_tied_embeddings: bool = False

    @property
    def num_layer_params(self) -> int:
        """Matmul weights of one layer: QKV, output projection, gate, up and down."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def num_head_params(self) -> int:
        """Weights of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """All matmul weights and embeddings; norms and biases are left out."""
        embeddings = self.num_head_params * (1 if self.has_tied_embeddings else 2)
        return self.num_layers * self.num_layer_params + embeddings

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_element
