"""Every family of Hugging Face checkpoints that is served, by model_type."""

from __future__ import annotations

from megatron_medha.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, KIMI_K2
from megatron_medha.models.families.gemma import GEMMA
from megatron_medha.models.families.glm4_moe import DOTS1, GLM4_MOE
from megatron_medha.models.families.gpt2 import GPT2
from megatron_medha.models.families.gpt_oss import GPT_OSS
from megatron_medha.models.families.granite import GRANITE, GRANITE_MOE
from megatron_medha.models.families.llama import LLAMA
from megatron_medha.models.families.mistral import MINISTRAL, MISTRAL
from megatron_medha.models.families.mixtral import MIXTRAL
from megatron_medha.models.families.paired import ERNIE4_5, GLM, HELIUM
from megatron_medha.models.families.phi3 import PHI3
from megatron_medha.models.families.qwen import QWEN2, QWEN3
from megatron_medha.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from megatron_medha.models.families.seed_oss import SEED_OSS
from megatron_medha.models.families.smollm3 import SMOLLM3
from megatron_medha.models.families.stablelm import STABLELM
from megatron_medha.models.families.ungated import ARCEE, JAIS2, NEMOTRON, STARCODER2

_ALL = (
    *(LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3, PHI3, SEED_OSS, ERNIE4_5, HELIUM, GRANITE),
    *(GPT2, STARCODER2, NEMOTRON, ARCEE, JAIS2, SMOLLM3, STABLELM, GLM, GEMMA),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, DOTS1, GRANITE_MOE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2, GLM4_MOE_LITE, GPT_OSS),
)
FAMILIES = {family.model_type: family for family in _ALL}
