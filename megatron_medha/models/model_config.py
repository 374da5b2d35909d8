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
            ffn_hidden_size=self.ffn_hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_context_len=self.max_context_len,
            bytes_per_element=bytes_per_element,
            kv_bytes_per_element=kv_bytes_per_element,
            has_tied_embeddings=self.has_tied_embeddings,
        )


MAX_CONTEXT_LEN = 1 << 32
