"""The architecture of a checkpoint, as far as building and running it needs. Reading it from files is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary scaling as Hugging Face configs state it; kind "none" leaves the frequencies alone."""

    kind: str = "none"              # none, linear, llama3, yarn, dynamic
    factor: float = 1.0
    low_freq_factor: float = 1.0    # llama3
    high_freq_factor: float = 4.0   # llama3
    original_max_context_len: int = 0  # llama3, yarn
    beta_fast: float = 32.0         # yarn
    beta_slow: float = 1.0          # yarn
    is_range_rounded: bool = True   # yarn: the range of blended dimensions, to whole ones
    attention_factor: float | None = None  # yarn; None: derived from the factor
    mscale: float | None = None     # yarn
    mscale_all_dim: float | None = None  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Llama family: RMSNorm, rotary positions, gated SiLU MLP, grouped-query attention."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int                 # rows of the embedding that mean a token; padding rows are not counted
    max_context_len: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    has_qkv_bias: bool = False      # Qwen2
    has_qk_norm: bool = False       # Qwen3
    has_tied_embeddings: bool = False
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
