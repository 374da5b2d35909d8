"""What a decoder computes: every trait of its architecture that its outputs, its cost or its memory follow from.

One object for reading a checkpoint, building the model and predicting its cost. No weights, no files here.
"""

from __future__ import annotations

from dataclasses import dataclass


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
class Experts:
    """A mixture of experts in place of a layer's MLP, and how its router picks and weighs them."""

    num_experts: int
    num_per_token: int
    ffn_hidden_size: int             # of one expert
    layers: tuple[bool, ...] = ()    # whether a layer has experts, by layer; empty: every layer has
    score: str = "softmax"           # softmax, sigmoid: of the router's logits
    is_scored_first: bool = False    # softmax over all experts before the choice; False: over the chosen ones
    has_choice_bias: bool = False    # added to the scores when experts are chosen, not when they are weighed
    num_groups: int | None = None    # experts come in groups, of which each token takes the best
    num_groups_per_token: int | None = None
    is_group_by_best: bool = False   # a group is as good as its best expert; False: as the sum of its best few
    weight_scale: float | None = None  # what the weights of the chosen experts are multiplied by
    shared_ffn_hidden_size: int = 0  # of the expert that every token goes through; 0: there is none
    has_shared_gate: bool = False    # the shared expert's output is weighed by a sigmoid of its own
    router_dtype: str | None = None  # fp32, fp64; None: the model's


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-latent attention: keys and values of all heads are projections of one latent vector."""

    q_rank: int | None     # of the queries' latent vector; None: queries are projected directly
    kv_rank: int           # of the keys' and values' latent vector
    nope_dim: int          # numbers of a head's query and key without position
    rope_dim: int          # and those with one, whose keys all heads share
    value_dim: int         # numbers of a head's value
    norm_epsilon: float | None = None  # of the latent vectors' norms; None: that of the others


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder. The defaults are Llama's: RMSNorm, rotary positions, gated SiLU MLP, grouped-query attention."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int            # of the MLP, in layers that have one
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int                 # rows of the embedding that mean a token; padding rows are not counted
    max_context_len: int            # also the number of learned positions
    norm_epsilon: float
    has_layer_norms: bool = False   # LayerNorm in place of RMSNorm
    has_zero_centred_norms: bool = False  # stored norm weights are less by one
    has_pre_norms: bool = True      # of what attention and the MLP take
    has_post_norms: bool = False    # of their outputs, before these are added
    embedding_scale: float = 1.0    # what embeddings are multiplied by
    logit_cap: float | None = None  # logits x become cap * tanh(x / cap)
    positions: str = "rotary"       # rotary, learned, none
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    rotary_dim: int | None = None   # numbers at a head's beginning that turn; None: all
    is_rotary_interleaved: bool = False  # pairs are neighbours, not (i, i + rotary_dim / 2)
    local_rope_theta: float | None = None  # the base of local layers, whose positions are not scaled
    local_rope_layers: tuple[bool, ...] = ()  # whether a layer is one, by layer; empty: none is
    no_rope_layers: tuple[bool, ...] = ()  # whether a layer goes without rotary positions, by layer; empty: none does
    has_qkv_bias: bool = False      # Qwen2
    has_linear_biases: bool = False  # of all linear layers, those of queries, keys and values too
    has_qk_norm: bool = False       # Qwen3: of each head
    is_qk_norm_wide: bool = False   # that norm is of all heads together
    has_qk_l2_norm: bool = False    # the same without weights
    has_output_gate: bool = False   # attention's output is multiplied by the sigmoid of a projection of its input
    softmax_scale: float | None = None  # of attention's scores; None: head_dim ** -0.5
    score_cap: float | None = None  # attention's scores, as logit_cap
    softmax: str = "plain"          # plain, sinks (a learned score beside each head's), off-by-one (that score is 0)
    window: int | None = None       # tokens that a query of a windowed layer sees, its own included
    window_layers: tuple[bool, ...] = ()  # whether a layer has the window, by layer; empty: every layer has
    activation: str = "silu"        # silu, gelu, gelu_tanh, quick_gelu, squared_relu, relu
    has_gate: bool = True           # the MLP multiplies the activation of one projection by another
    activation_clamp: float | None = None  # gate and up are cut off there
    gate_offset: float = 0.0        # added to what the activation is multiplied by
    experts: Experts | None = None
    latent: LatentAttention | None = None
    has_tied_embeddings: bool = False

    @property
    def is_llama_like(self) -> bool:
        """Whether all that differs from Llama is a bias of q, k and v, or their norm: what the fast layers compute."""
        return not self.traits

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits that Llama, Mistral, Qwen2 and Qwen3 do not have, in words."""
        named = {
            "LayerNorm": self.has_layer_norms,
            "zero-centred norms": self.has_zero_centred_norms,
            "norms after layers alone" if not self.has_pre_norms else "norms after layers": self.has_post_norms,
            "scaled embeddings": self.embedding_scale != 1.0,
            "capped logits": self.logit_cap is not None,
            "learned positions" if self.positions == "learned" else "no positions": self.positions != "rotary",
            "partial rotary": self.positions == "rotary" and self.num_rotated < self.rope_width,
            "interleaved rotary": self.is_rotary_interleaved,
            "layers without rotary": any(self.no_rope_layers),
            "two rotary bases": any(self.local_rope_layers),
            "biases": self.has_linear_biases,
            "norm of all heads together": self.is_qk_norm_wide,
            "L2 norm of q and k": self.has_qk_l2_norm,
            "attention output gate": self.has_output_gate,
            "softmax scale": self.softmax_scale is not None,
            "capped scores": self.score_cap is not None,
            self.softmax: self.softmax != "plain",
            "window": self.window is not None,
            self.activation if self.has_gate else f"{self.activation} without gate": (
                self.activation != "silu" or not self.has_gate
            ),
            "clamped or offset gate": self.activation_clamp is not None or self.gate_offset != 0.0,
            "experts": self.experts is not None,
            "latent attention": self.latent is not None,
        }
        return tuple(name for name, is_set in named.items() if is_set)

    @property
    def rope_width(self) -> int:
        """Numbers of a query or key that rotary positions may turn."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def num_rotated(self) -> int:
        """Numbers of them that do turn."""
        return self.rope_width if self.rotary_dim is None else self.rotary_dim

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has the window."""
        return self.window is not None and (not self.window_layers or self.window_layers[layer])

    def num_cached_heads(self, tp: int) -> int:
        """Key/value heads in the KV cache of each of tp ranks; a latent vector is one, on all of them."""
        return self.num_kv_heads // tp if self.latent is None else 1

    def queries_per_cached_head(self, tp: int) -> int:
        """Query heads that share one of them."""
        return self.num_heads // self.num_kv_heads if self.latent is None else max(1, self.num_heads // tp)

    @property
    def cached_head_dim(self) -> int:
        """Numbers of a key in the KV cache, and of a value."""
        return self.head_dim if self.latent is None else self.latent.kv_rank + self.latent.rope_dim
