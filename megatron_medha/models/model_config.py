"""The model of a checkpoint, as far as building and running it needs. Reading it from files is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ModelSpec):
    """The model of a checkpoint: its architecture, the dtype of its weights, and the tokens that end an output."""

    dtype: str = "float32"          # of the stored weights: float32, bfloat16, float16
    stop_token_ids: tuple[int, ...] = ()

    def shape(self, bytes_per_element: int, kv_bytes_per_element: int | None = None) -> ModelShape:
        """The numbers cost and memory follow from, at the dtypes it is run in."""
        return ModelShape(
            name=self.name,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_context_len=self.max_context_len,
            bytes_per_element=bytes_per_element,
            kv_bytes_per_element=kv_bytes_per_element,
            has_tied_embeddings=self.has_tied_embeddings,
            num_mlp_matrices=3 if self.has_gate else 2,
            num_learned_positions=self.max_context_len if self.positions == "learned" else 0,
            num_vector_params=self._num_vector_params,
            latent_dim=0 if self.latent is None else self.cached_head_dim,
            num_latent_params=self._num_latent_params,
            **self._mlp_sizes,
        )

    @property
    def _num_latent_params(self) -> int:
        """Projections down to the latent vectors and up from them, and the output's."""
        latent, heads = self.latent, self.num_heads
        if latent is None:
            return 0
        query = heads * (latent.nope_dim + latent.rope_dim)
        q_rank = latent.q_rank
        queries = self.hidden_size * query if q_rank is None else q_rank * (self.hidden_size + query)
        keys = self.hidden_size * self.cached_head_dim + latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
        return queries + keys + heads * latent.value_dim * self.hidden_size

    @property
    def _mlp_sizes(self) -> dict[str, int]:
        experts = self.experts
        if experts is None:
            return {"ffn_hidden_size": self.ffn_hidden_size}
        num_dense = sum(not has for has in experts.layers)
        return {
            "ffn_hidden_size": experts.ffn_hidden_size,
            "num_experts": experts.num_experts,
            "num_experts_per_token": experts.num_per_token,
            "shared_ffn_hidden_size": experts.shared_ffn_hidden_size,
            "num_dense_layers": num_dense,
            "dense_ffn_hidden_size": self.ffn_hidden_size if num_dense else 0,
        }

    @property
    def _num_vector_params(self) -> int:
        """Norms and biases of a layer without experts; those of experts are few beside their weights."""
        of_heads = self.num_heads + self.num_kv_heads if self.is_qk_norm_wide else 2
        each = 2 * self.hidden_size * (2 if self.has_layer_norms else 1)
        norms = each * (self.has_pre_norms + self.has_post_norms) + of_heads * self.head_dim * self.has_qk_norm
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if self.has_linear_biases:
            return norms + qkv + 2 * self.hidden_size + (1 + self.has_gate) * self.ffn_hidden_size
        return norms + qkv * self.has_qkv_bias


MAX_CONTEXT_LEN = 1 << 32
