"""ERNIE 4.5 and Helium: Llamas in which neighbouring numbers of a query or key turn together.

The rows of their projections are loaded in another order, queries and keys alike: their products do not change.
"""

from __future__ import annotations

from megatron_medha.models.families.family import Family, Rule
from megatron_medha.models.families.llama import MLP_BIAS, PAIRED_ROWS

ERNIE4_5 = Family(
    model_type="ernie4_5",
    defaults={
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    reads="use_bias",
    rules={"use_bias": Rule((None, False), "linear layers have no biases here")},
    tensors=lambda _: PAIRED_ROWS,
)  # fmt: skip
HELIUM = Family(
    model_type="helium",
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
    },
    rules={"mlp_bias": MLP_BIAS},
    traits=lambda config: {"has_qkv_bias": config.flag("attention_bias")},
    tensors=lambda _: PAIRED_ROWS,
)  # fmt: skip
