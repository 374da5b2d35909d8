"""Every family of Hugging Face checkpoints that is served, by model_type."""

from __future__ import annotations

from megatron_medha.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, KIMI_K2
from megatron_medha.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from megatron_medha.models.families.glm4_moe import DOTS1, GLM4_MOE
from megatron_medha.models.families.gpt2 import GPT2
from megatron_medha.models.families.gpt_oss import GPT_OSS
from megatron_medha.models.families.granite import GRANITE, GRANITE_MOE
from megatron_medha.models.families.llama import LLAMA
from megatron_medha.models.families.mistral import MINISTRAL, MISTRAL
from megatron_medha.models.families.mixtral import MIXTRAL
from megatron_medha.models.families.olmo import OLMO2, OLMO3, OLMOE
from megatron_medha.models.families.paired import ERNIE4_5, GLM, GLM4, HELIUM
from megatron_medha.models.families.phi3 import PHI3
from megatron_medha.models.families.qwen import QWEN2, QWEN3, SEED_OSS
from megatron_medha.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from megatron_medha.models.families.smollm3 import SMOLLM3
from megatron_medha.models.families.stablelm import STABLELM
from megatron_medha.models.families.ungated import ARCEE, JAIS2, NEMOTRON, STARCODER2

_ALL = (
    *(LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, PHI3, SEED_OSS, ERNIE4_5, HELIUM, GRANITE),
    *(GPT2, STARCODER2, NEMOTRON, ARCEE, JAIS2, SMOLLM3, STABLELM, GLM, GLM4, GEMMA),
    *(GEMMA2, GEMMA3, OLMO2, OLMO3),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, DOTS1, GRANITE_MOE, OLMOE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GLM4_MOE_LITE, GPT_OSS),
)
# Families that people ask for, and what of them is missing.
NOT_SERVED = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "kimi_linear", "nemotron_h", "falcon_h1", "bamba", "jamba", "mamba",
         "mamba2", "lfm2", "granitemoehybrid"),
        "layers that keep a state in place of keys and values",
    ),
    **dict.fromkeys(
        ("gpt_neox", "gptj", "falcon", "phi", "cohere", "cohere2"), "an MLP beside attention instead of after it"
    ),
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), "attention to keys that an index chooses"),
    **dict.fromkeys(("llama4", "llama4_text"), "attention within chunks of positions"),
    **dict.fromkeys(("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "images beside text"),
    "gemma3n": "embeddings of each layer",
    "gemma4": "embeddings of each layer",
    "bloom": "ALiBi positions",
    "mpt": "ALiBi positions",
    "opt": "learned positions that begin at 2",
    "apertus": "an activation with learned numbers",
}
FAMILIES = {family.model_type: family for family in _ALL}
