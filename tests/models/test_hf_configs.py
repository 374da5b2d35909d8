"""Variants of Hugging Face configs beside transformers: the same logits, or refused with reasons; never another model.

One small random checkpoint a family and layout of its weights; each variant edits config.json only, as people do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from megatron_medha.checkpoints.detect import load_weights, read_model_config  # noqa: E402
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError  # noqa: E402
from megatron_medha.core.layout import ParallelLayout  # noqa: E402
from megatron_medha.model.build import build_model  # noqa: E402
from megatron_medha.models.hf_config import read_hf_config  # noqa: E402
from megatron_medha.models.model_config import ModelConfig  # noqa: E402
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed  # noqa: E402
from tests.model.paged_run import PagedRun  # noqa: E402

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
# More than the 256 positions that the models were made for, so that dynamic scaling and windows show.
IDS = torch.randint(0, 101, (1, 300), generator=torch.Generator().manual_seed(1))

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}  # fmt: skip
DELETE = object()


def scaled(rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """rope_parameters of transformers 5."""
    return {"rope_parameters": {"rope_theta": 10000.0, **rope, **more}}


def scaled_4(rope: dict[str, Any], theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """rope_scaling and rope_theta at the top level, of transformers 4."""
    return {"rope_parameters": DELETE, "rope_theta": theta, "rope_scaling": {**rope, **more}}


def typed(rope: dict[str, Any]) -> dict[str, Any]:
    """The older spelling "type"."""
    return {("type" if key == "rope_type" else key): value for key, value in rope.items()}


# Equal to transformers in every family.
EQUAL: dict[str, dict[str, Any]] = {
    "as saved": {},
    "default rope": scaled({"rope_type": "default"}),
    "default rope, theta 5e5": scaled({"rope_type": "default"}, rope_theta=500000.0),
    "default rope with fields of others": scaled({"rope_type": "default"}, factor=4.0, beta_fast=8.0),
    "no rope fields": {"rope_parameters": DELETE},
    "rope_parameters null": {"rope_parameters": None},
    "rope_scaling null": {"rope_scaling": None},
    "rope_theta at the top": {"rope_parameters": DELETE, "rope_theta": 1000000.0},
    "rope_theta twice": {"rope_theta": 1000000.0},
    "theta of rope_parameters absent": {"rope_parameters": {"rope_type": "default"}},
    "theta beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000.0},
    "linear": scaled(LINEAR),
    "linear of transformers 4": scaled_4(LINEAR),
    "linear, type": scaled_4(typed(LINEAR), 500000.0),
    "linear, a whole factor": scaled(LINEAR, factor=2),
    "dynamic": scaled(DYNAMIC),
    "dynamic of transformers 4": scaled_4(DYNAMIC),
    "dynamic, type": scaled_4(typed(DYNAMIC)),
    "dynamic with the original context": scaled(DYNAMIC, original_max_position_embeddings=64),
    "llama3": scaled(LLAMA3),
    "llama3 of transformers 4": scaled_4(LLAMA3, 500000.0),
    "llama3, the context of the top level": scaled(LLAMA3) | {"original_max_position_embeddings": 128},
    "llama3 without the original context": scaled({**LLAMA3, "original_max_position_embeddings": 256}),
    "llama3, other factors": scaled(LLAMA3, low_freq_factor=2.0, high_freq_factor=8.0, factor=32.0),
    "llama3 with both spellings of its type": scaled_4(LLAMA3, type="linear"),
    "yarn": scaled(YARN),
    "yarn of transformers 4": scaled_4(YARN),
    "yarn, type": scaled_4(typed(YARN)),
    "yarn, finetuned": scaled_4(typed(YARN), finetuned=True),
    "yarn, factor null": scaled(YARN, factor=None),
    "yarn without the original context": scaled({"rope_type": "yarn", "factor": 2.0}),
    "yarn, the context of the top level": scaled(YARN) | {"original_max_position_embeddings": 128},
    "yarn, attention_factor": scaled(YARN, attention_factor=1.5),
    "yarn, attention_factor of 1": scaled(YARN, attention_factor=1.0),
    "yarn, betas": scaled(YARN, beta_fast=16.0, beta_slow=2.0),
    "yarn, whole betas": scaled(YARN, beta_fast=64, beta_slow=1),
    "yarn, mscale": scaled(YARN, mscale=0.707, mscale_all_dim=1.0),
    "yarn, one mscale": scaled(YARN, mscale=0.707),
    "yarn, equal mscales": scaled(YARN, mscale=1.0, mscale_all_dim=1.0),
    "yarn, mscale and attention_factor": scaled(YARN, mscale=0.707, mscale_all_dim=1.0, attention_factor=0.9),
    "yarn, not truncated": scaled(YARN, truncate=False),
    "yarn, truncated": scaled(YARN, truncate=True),
    "yarn, truncate null": scaled(YARN, truncate=None),
    "yarn, theta 1e6": scaled(YARN, rope_theta=1000000.0),
    "yarn by 32": scaled(YARN, factor=32.0),
    "rope_scaling beside rope_parameters": {"rope_scaling": YARN},
    "linear rope_scaling beside rope_parameters": {"rope_scaling": typed(LINEAR)},
    "dynamic rope_scaling beside rope_parameters": {"rope_scaling": DYNAMIC},
    "llama3 rope_scaling beside rope_parameters": {"rope_scaling": LLAMA3},
    "rope_scaling beside rope_parameters of another kind": {**scaled(LINEAR), "rope_scaling": YARN},
    "rope_scaling with its theta beside rope_parameters": {"rope_scaling": {**YARN, "rope_theta": 10000.0}},
    "rope_scaling empty beside yarn": {**scaled(YARN), "rope_scaling": {}},
    "partial_rotary_factor of 1": scaled({"rope_type": "default"}, partial_rotary_factor=1.0),
    "partial_rotary_factor of 1 at the top": {"partial_rotary_factor": 1.0},
    "silu": {"hidden_act": "silu"},
    "swish": {"hidden_act": "swish"},
    "epsilon 1e-3": {"rms_norm_eps": 1e-3},
    "epsilon absent": {"rms_norm_eps": DELETE},
    "no biases": {"attention_bias": False, "mlp_bias": False},
    "pretraining_tp": {"pretraining_tp": 2},
    "dropout": {"attention_dropout": 0.5, "hidden_dropout": 0.5, "resid_pdrop": 0.1},
    "dtype bfloat16": {"dtype": "bfloat16"},
    "torch_dtype float16": {"dtype": DELETE, "torch_dtype": "float16"},
    "both dtypes": {"dtype": "float32", "torch_dtype": "bfloat16"},
    "no dtype": {"dtype": DELETE},
    "untied by default": {"tie_word_embeddings": DELETE},
    "no cache": {"use_cache": False},
    "window null": {"sliding_window": None},
    "window of the whole context": {"sliding_window": 4096},
    "unknown fields that are off": {"use_mrope": False, "moe": None, "extra": [], "num_nextn_predict_layers": 0},
    "notes of tools": {
        "unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}, "_name_or_path": "x", "auto_map": {"a": "b"},
        "is_llama_config": True,
        "activation": "swiglu", "max_sequence_length": 64, "temperature": 0.5, "image_token_id": 7,
    },
    "more notes of tools": {
        "neuron": {"num_cores": 2}, "base_model": "x", "_merge_method": "slerp", "_rope_scaling": YARN, "lora_r": 8,
        "seq_length": 64, "bf16": True, "use_flash_attn": True, "init_std": 0.1, "loss_type": "ForCausalLM",
        "max_new_tokens": 5, "is_decoder": True, "is_causal": True, "summary_type": "x", "pad_token": "<pad>",
        "training_args": {"lr": 1}, "num_train_epochs": 3, "nemo_version": "2", "license": "mit", "seed": 1,
        "embedding_dropout": 0.1, "rotary_pct": 1.0, "no_bias": True, "tp_size": 2,
        "gradient_checkpointing_kwargs": {"a": 1},
    },
    "yarn with vLLM's factors of 1": scaled(YARN, attn_factor=1.0, extrapolation_factor=1),
    "no shorter context": {"max_position_embeddings": 128},
    "all kv heads absent": {"num_key_value_heads": 2},
}  # fmt: skip

# Refused in every family, naming the field.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": (scaled(LONGROPE), "rope_type"),
    "longrope of transformers 4": (scaled_4(LONGROPE), "rope_type"),
    "su": (scaled_4({**typed(LONGROPE), "type": "su"}), "type"),
    "mrope": (scaled_4({"type": "mrope", "mrope_section": [2, 3, 3]}), "mrope_section"),
    "proportional": (scaled({"rope_type": "proportional", "factor": 2.0}), "rope_type"),
    "ntk": (scaled_4({"type": "ntk", "factor": 2.0}), "type"),
    "rope_type null": (scaled({"rope_type": None}), "rope_type"),
    "rope_type a list": (scaled({"rope_type": ["yarn"]}), "rope_type"),
    "dynamic with alpha": (scaled(DYNAMIC, alpha=1000.0), "alpha"),
    "unknown rope field": (scaled(YARN, attention_temperature=0.5), "attention_temperature"),
    "half of each head": (scaled({"rope_type": "default"}, partial_rotary_factor=0.5), "partial_rotary_factor"),
    "half of each head, top": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "vLLM's attn_factor": (scaled(YARN, attn_factor=0.878), r"attn_factor=0\.878 .*attention_factor"),
    "linear without factor": (scaled({"rope_type": "linear"}), "factor"),
    "linear, factor a string": (scaled({"rope_type": "linear", "factor": "4"}), "factor"),
    "llama3 without factors": (scaled({"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    "llama3, factors swapped": (scaled(LLAMA3, low_freq_factor=4.0, high_freq_factor=1.0), "high_freq_factor"),
    "yarn, truncate a string": (scaled(YARN, truncate="no"), "truncate"),
    "theta null": ({"rope_parameters": {"rope_theta": None}}, "rope_theta"),
    "theta of 400 digits": ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
    "theta of 1": (scaled(YARN, rope_theta=1.0), "rope_theta"),
    "theta below 1": (scaled({"rope_type": "default"}, rope_theta=1e-6), "rope_theta"),
    "theta of 300 digits": (scaled(DYNAMIC, rope_theta=1e300), "rope_theta"),
    "yarn, a factor of 300 digits": (scaled(YARN, factor=1.7e308), "factor"),
    "yarn, a beta of 300 digits": (scaled(YARN, beta_fast=1.7e308), "beta_fast"),
    "yarn, a factor of nothing": (scaled(YARN, mscale=1e-300), "mscale"),
    "llama3, a context of 30 digits": (
        scaled(LLAMA3, original_max_position_embeddings=10**30), "original_max_position_embeddings"),
    "dynamic with heads of 2": (scaled(DYNAMIC) | {"head_dim": 2}, "head_dim"),
    "theta negative": ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}, "full_attention"
    ),
    "rope_scaling that loses theta": (
        {**scaled({"rope_type": "default"}, rope_theta=1000000.0), "rope_scaling": YARN}, "rope_theta"
    ),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "relu2": ({"hidden_act": "relu2"}, "hidden_act"),
    "softcap": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    "final softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "attention multiplier": ({"attention_multiplier": 0.1}, "attention_multiplier"),
    "logits scaling": ({"logits_scaling": 8.0}, "logits_scaling"),
    "embedding multiplier": ({"embedding_multiplier": 12}, "embedding_multiplier"),
    "query scale": ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
    "tokens see later ones": ({"is_causal": False}, "is_causal"),
    "tokens see later ones, null": ({"is_causal": None}, "is_causal"),
    "a token of a class": ({"use_cls_token": True}, "use_cls_token"),
    "latent attention": ({"kv_lora_rank": 512}, "kv_lora_rank"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "qk norm": ({"use_qk_norm": True}, "use_qk_norm"),
    "layers of their own": ({"per_layer_config": {"0": {"intermediate_size": 96}}}, "per_layer_config"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "compressed": ({"compression_config": {"format": "int"}}, "compression_config"),
    "dtype float8": ({"dtype": "float8_e4m3fn"}, "dtype"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "other family": ({"model_type": "mamba2"}, "model_type"),
    "chunked attention": ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "all at once": ({"hidden_act": "gelu", "softcap": 1.0, **scaled(LONGROPE)}, "hidden_act.*\n.*|softcap"),
}  # fmt: skip

# What is equal or refused in one family only: None is equal, a name the field that is refused.
OF_FAMILIES: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("llama", "attention bias", {"attention_bias": True}, "attention_bias"),
    ("llama", "mlp bias", {"mlp_bias": True}, "mlp_bias"),
    ("llama", "head_dim null", {"head_dim": None}, None),
    ("llama", "head_dim absent", {"head_dim": DELETE}, None),
    ("llama", "a window that other code would use", {"sliding_window": 64}, "sliding_window"),
    ("llama", "a window that is off", {"sliding_window": 64, "use_sliding_window": False}, None),
    ("mistral", "attention bias is passed over", {"attention_bias": True, "mlp_bias": True}, None),
    ("mistral", "window", {"sliding_window": 64}, None),
    ("mistral", "window by default", {"sliding_window": DELETE, "max_position_embeddings": 8192}, None),
    ("mistral", "window by default, short context", {"sliding_window": DELETE}, None),
    ("mistral", "context by default", {"sliding_window": 4096, "max_position_embeddings": DELETE}, None),
    ("mistral", "full layer types with a window", {"sliding_window": 64, "layer_types": ["full_attention"] * 2},
     "layer_types"),
    ("mistral", "windowed layer types", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, None),
    ("mistral", "a window below yarn's context", {"sliding_window": 300, **scaled(YARN, factor=8.0)}, None),
    ("mistral", "window of 0", {"sliding_window": 0}, "sliding_window"),
    ("mistral", "window a string", {"sliding_window": "64"}, "sliding_window"),
    ("qwen2", "attention bias is passed over", {"attention_bias": False, "mlp_bias": True}, None),
    ("qwen2", "head_dim stated", {"head_dim": 16}, None),
    ("qwen2", "window off", {"sliding_window": 64, "layer_types": DELETE}, None),
    ("qwen2", "window on", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0,
     "layer_types": DELETE}, None),
    ("qwen2", "window from a layer on", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1,
     "layer_types": DELETE}, None),
    ("qwen2", "window of no layer", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2,
     "layer_types": DELETE}, None),
    ("qwen2", "window of no layer by default", {"use_sliding_window": True, "sliding_window": 64,
     "max_window_layers": DELETE, "layer_types": DELETE}, None),
    ("qwen2", "layer types against max_window_layers", {"use_sliding_window": True, "sliding_window": 64,
     "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, None),
    ("qwen2", "windowed layer types", {"use_sliding_window": True, "sliding_window": 64,
     "layer_types": ["full_attention", "sliding_attention"]}, None),
    ("qwen2", "windowed layer types without a window", {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types"),
    ("qwen2", "too few layer types", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", "a window below yarn's context", {"use_sliding_window": True, "sliding_window": 300,
     "max_window_layers": 0, "layer_types": DELETE, **scaled(YARN, factor=8.0)}, None),
    ("qwen3", "attention bias", {"attention_bias": True}, "attention_bias"),
    ("qwen3", "window on", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0,
     "layer_types": DELETE}, None),
    ("qwen3", "window off", {"sliding_window": 64, "layer_types": DELETE}, None),
    ("qwen3", "context by default", {"max_position_embeddings": DELETE}, None),
]  # fmt: skip

# Fields as well-known checkpoints have them, with small sizes: (what config.json says, rope kind, context).
KNOWN: dict[str, tuple[dict[str, Any], str, int]] = {
    "Llama 3.1": ({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": [2, 3, 4], "hidden_act": "silu", "mlp_bias": False,
        "max_position_embeddings": 131072, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    }, "llama3", 131072),
    "Qwen 2.5": ({
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 4096, "use_sliding_window": False, "use_mrope": False, "torch_dtype": "bfloat16",
    }, "none", 32768),
    "Qwen 3": ({
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960,
        "max_window_layers": 36, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }, "none", 40960),
    "Mistral 7B v0.3": ({
        "model_type": "mistral", "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    }, "none", 32768),
    "SmolLM2": ({
        "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 130000, "max_position_embeddings": 8192, "transformers.js_config": {"dtype": "q4"},
    }, "none", 8192),
    "SmolLM2 out of a GGUF file": ({
        "model_type": "llama", "_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2", "head_dim": 64,
        "max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "unk_token_id": 0,
    }, "none", 8192),
    "DeepSeek Coder": ({
        "model_type": "llama", "max_position_embeddings": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000, "pretraining_tp": 1,
    }, "linear", 16384),
    "Falcon 3": ({
        "model_type": "llama", "activation": "swiglu", "head_dim": 256, "max_position_embeddings": 32768,
        "rope_theta": 1000042,
    }, "none", 32768),
    "Yarn Llama 2": ({
        "model_type": "llama", "auto_map": {"AutoConfig": "a.B"}, "max_position_embeddings": 65536,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
    }, "yarn", 65536),
}  # fmt: skip

# A quick choice runs always: every refusal, and of the equal ones each where its family is the next in turn.
ALL_EQUAL = [(family, name) for name in EQUAL for family in FAMILIES]
QUICK = {
    (list(FAMILIES)[i % 4], name)
    for i, name in enumerate(EQUAL)
    if i % 2 == 0 or any(word in name for word in ("beside", "notes"))
}


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, traits in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp(family)
        settings = {
            "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.2, "eos_token_id": 2,
        } | traits  # fmt: skip
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # norms and biases, which start as ones and zeros
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(found[family])
    return found


def variant(home: Path, directory: Path, changes: dict[str, Any]) -> Path:
    """A copy of that checkpoint with another config."""
    fields = json.loads((home / "config.json").read_text()) | changes
    kept = {key: value for key, value in fields.items() if value is not DELETE}
    (directory / "config.json").write_text(json.dumps(kept))
    shutil.copy(home / "model.safetensors", directory)
    return directory


def assert_equal_to_transformers(directory: Path, groups: MedhaPGs) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    with torch.no_grad():
        expected = reference(IDS).logits
        actual = model(IDS, None, None) if config.is_llama_like else paged_logits(model, config)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def paged_logits(model: Any, config: ModelConfig) -> torch.Tensor:
    """Layers that are not trained here compute packed batches only."""
    run = PagedRun(model, config, block_size=16)
    prompts = [run.add(ids) for ids in IDS]
    run.step([(prompt, IDS.shape[1]) for prompt in prompts])
    return torch.stack([torch.cat(prompt.logits) for prompt in prompts])


@pytest.mark.parametrize(("family", "name"), [case for case in ALL_EQUAL if case in QUICK])
def test_a_variant_has_the_logits_of_transformers(
    family: str, name: str, homes: dict[str, Path], tmp_path: Path, groups: MedhaPGs
):
    assert_equal_to_transformers(variant(homes[family], tmp_path, EQUAL[name]), groups)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [case for case in ALL_EQUAL if case not in QUICK])
def test_every_variant_has_the_logits_of_transformers(
    family: str, name: str, homes: dict[str, Path], tmp_path: Path, groups: MedhaPGs
):
    assert_equal_to_transformers(variant(homes[family], tmp_path, EQUAL[name]), groups)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [case[:1] + case[2:] for case in OF_FAMILIES],
    ids=[", ".join(case[:2]) for case in OF_FAMILIES],
)
def test_a_variant_of_one_family_is_equal_or_refused(
    family: str, changes: dict[str, Any], told: str | None, homes: dict[str, Path], tmp_path: Path, groups: MedhaPGs
):
    directory = variant(homes[family], tmp_path, changes)
    if told is None:
        return assert_equal_to_transformers(directory, groups)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=rf"config\.json: .*{told}"):
        read_model_config(directory)


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_cannot_run_is_refused_in_every_family(name: str, homes: dict[str, Path], tmp_path: Path):
    changes, told = REFUSED[name]
    for family in FAMILIES:
        with pytest.raises((CheckpointError, UnsupportedModelError), match=rf"config\.json: .*{told}"):
            read_model_config(variant(homes[family], tmp_path, changes))


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", [1], {"a": 1}])
def test_an_unknown_field_that_is_set_is_refused(value: Any, homes: dict[str, Path], tmp_path: Path):
    for family in FAMILIES:
        with pytest.raises(UnsupportedModelError, match="no_such_field"):
            read_model_config(variant(homes[family], tmp_path, {"no_such_field": value}))


def test_all_reasons_against_a_config_are_given_at_once(homes: dict[str, Path], tmp_path: Path):
    changes = {"hidden_act": "gelu", "softcap": 1.0, **scaled(LONGROPE, no_such=1), "quantization_config": {}}
    with pytest.raises(UnsupportedModelError) as caught:
        read_model_config(variant(homes["llama"], tmp_path, changes))
    for told in ("hidden_act='gelu'", "softcap=1.0", "rope_type='longrope'", "no_such=1", "quantization_config"):
        assert told in str(caught.value)


@pytest.mark.parametrize("name", KNOWN)
def test_configs_of_well_known_checkpoints_are_read(name: str, tmp_path: Path):
    fields, kind, context = KNOWN[name]
    sizes = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes | fields))
    config = read_hf_config(tmp_path)
    assert (config.rope_scaling.kind, config.max_context_len) == (kind, context)
    assert config.rope_theta == fields.get("rope_theta", 10000.0)
