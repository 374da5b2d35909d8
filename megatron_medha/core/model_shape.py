"""The shape of a decoder, dense or mixture of experts: the numbers that cost and memory follow from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A GQA decoder with an MLP (Llama, Mistral, Qwen), or with experts that are such MLPs (Mixtral, Qwen3 MoE)."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the MLP, or of one expert
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_len: int
    bytes_per_element: int = 2  # of weights
    kv_bytes_per_element: int | None = None  # of KV; None: as weights
    has_tied_embeddings: bool = False
    num_experts: int = 1            # of every layer that has any; 1: dense
    num_experts_per_token: int = 1  # that the router picks
    shared_ffn_hidden_size: int = 0  # of the expert that every token goes through besides; 0: there is none
    num_dense_layers: int = 0       # of a mixture: layers that have an MLP, counted as the first ones
    dense_ffn_hidden_size: int = 0  # of that MLP
    num_mlp_matrices: int = 3       # gate, up and down; 2: there is no gate
    num_learned_positions: int = 0  # rows of a table of positions; 0: they are computed
    num_vector_params: int = 0      # norms and biases of one layer
    latent_dim: int = 0             # numbers of the one key per token that latent attention caches; 0: a key per head
    num_latent_params: int = 0      # matmul weights of one layer's latent attention

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ConfigError(
                f"model.shape.num_experts_per_token={self.num_experts_per_token} must be between 1 and "
                f"model.shape.num_experts={self.num_experts}"
            )
        if self.num_dense_layers and not 0 < self.num_dense_layers < self.num_layers:
            raise ConfigError(
                f"model.shape.num_dense_layers={self.num_dense_layers} must be below "
                f"model.shape.num_layers={self.num_layers}"
            )

    @property
    def num_attention_params(self) -> int:
        """Matmul weights of one layer's attention: QKV and output projection."""
        if self.latent_dim:
            return self.num_latent_params
        return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def num_expert_params(self) -> int:
        """Weights of one expert (or of the MLP): gate, up and down."""
        return self.num_mlp_matrices * self.hidden_size * self.ffn_hidden_size

    @property
    def num_router_params(self) -> int:
        """Weights that choose among the experts of a layer; a dense model has none."""
        return self.hidden_size * self.num_experts if self.num_experts > 1 else 0

    @property
    def num_layer_params(self) -> int:
        """Matmul weights of a layer, all experts; on average, where layers differ."""
        return self.num_attention_params + round(self._mean_mlp_params(self.num_experts))

    @property
    def num_active_layer_params(self) -> int:
        """Matmul weights of a layer that a token is multiplied with; on average, where layers differ."""
        return self.num_attention_params + round(self._mean_mlp_params(self.num_experts_per_token))

    def num_params_of_layers(self, first: int, num_layers: int) -> int:
        """Weights of consecutive layers, norms and biases too if they are known."""
        num_dense = min(max(self.num_dense_layers - first, 0), num_layers)
        mlps = (num_layers - num_dense) * self._num_mixture_params(self.num_experts) + num_dense * self._num_mlp_params
        return num_layers * (self.num_attention_params + self.num_vector_params) + round(mlps)

    @property
    def num_mlp_numbers(self) -> int:
        """Numbers that the widest layer's experts make of one token between their inputs and their outputs."""
        of_experts = self.num_experts_per_token * self.ffn_hidden_size + self.shared_ffn_hidden_size
        return self.num_mlp_matrices * max(of_experts, self.dense_ffn_hidden_size)

    def _num_mixture_params(self, num_experts: float) -> float:
        """Of a layer with so many of its experts."""
        shared = self.num_mlp_matrices * self.hidden_size * self.shared_ffn_hidden_size
        return self.num_router_params + num_experts * self.num_expert_params + shared

    @property
    def _num_mlp_params(self) -> int:
        """Of the MLP of a layer without experts."""
        return self.num_mlp_matrices * self.hidden_size * self.dense_ffn_hidden_size

    def _mean_mlp_params(self, num_experts: float) -> float:
        share = self.num_dense_layers / self.num_layers
        return (1 - share) * self._num_mixture_params(num_experts) + share * self._num_mlp_params

    def num_experts_touched(self, num_tokens: float) -> float:
        """Experts of a layer that at least one of so many tokens is sent to, if the router spreads them evenly."""
        if self.num_experts == 1:
            return 1.0
        untouched_share = 1.0 - self.num_experts_per_token / self.num_experts
        return self.num_experts * (1.0 - float(untouched_share**num_tokens))

    def num_touched_layer_params(self, num_tokens: float) -> float:
        """Matmul weights of one layer that a step of so many tokens has to read."""
        return self.num_attention_params + self._mean_mlp_params(self.num_experts_touched(num_tokens))

    @property
    def num_head_params(self) -> int:
        """Weights of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_params(self) -> int:
        """All weights and embeddings; norms and biases if they are known."""
        embeddings = self.num_head_params * (1 if self.has_tied_embeddings else 2)
        positions = self.num_learned_positions * self.hidden_size
        return self.num_params_of_layers(0, self.num_layers) + embeddings + positions

    @property
    def num_active_params(self) -> int:
        """Matmul weights that a token of the output is multiplied with; the embedding is looked up, not multiplied."""
        return self.num_layers * self.num_active_layer_params + self.num_head_params

    def num_stage_layers(self, stage: int, spp: int) -> int:
        """Layers of one of `spp` pipeline stages; where they do not divide, the first stages have one more."""
        return self.num_layers // spp + (stage < self.num_layers % spp)

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_cached_heads * self.cached_dim * self.kv_element_bytes

    @property
    def num_cached_heads(self) -> int:
        """Heads that KV has, and so the most ranks that share it out; a latent vector is one for all heads."""
        return 1 if self.latent_dim else self.num_kv_heads

    @property
    def cached_dim(self) -> int:
        """Numbers of a key or a value in KV, and of the products of a query with it."""
        return self.latent_dim or self.head_dim

    @property
    def kv_element_bytes(self) -> int:
        """Of one number of K or V."""
        return self.bytes_per_element if self.kv_bytes_per_element is None else self.kv_bytes_per_element
