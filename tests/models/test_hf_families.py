"""Every family of Hugging Face checkpoints beside transformers: the same logits, and the same defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")
from megatron_medha.checkpoints.detect import load_weights, read_model_config  # noqa: E402
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError  # noqa: E402
from megatron_medha.core.layout import ParallelLayout  # noqa: E402
from megatron_medha.model.build import build_model  # noqa: E402
from megatron_medha.model.latent_attention import absorb_projections  # noqa: E402
from megatron_medha.models.families.family_table import FAMILIES  # noqa: E402
from megatron_medha.models.hf_config import read_hf_config  # noqa: E402
from megatron_medha.models.model_config import ModelConfig  # noqa: E402
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed  # noqa: E402
from tests.model.paged_run import PagedRun  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 101, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
MULTIPLIED = {
    "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
}  # fmt: skip
MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 3}
QWEN_MIXTURE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}  # fmt: skip
# Beside the sizes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral": ("ministral", {"sliding_window": 256, "head_dim": 16}),
    "ministral, full attention": ("ministral", {
        "sliding_window": 16, "layer_types": ["full_attention"] * 4, "head_dim": 16}),
    "ministral, windows": ("ministral", {
        "sliding_window": 16, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "phi3, windows": ("phi3", {"pad_token_id": 0, "sliding_window": 20}),
    "smollm3, windows": ("smollm3", {
        "pad_token_id": 0, "use_sliding_window": True, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "mixtral, windows": ("mixtral", {**MIXTURE, "sliding_window": 16}),
    "starcoder2, windows": ("starcoder2", {"sliding_window": 30}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3, all heads": ("phi3", {"pad_token_id": 0, "num_key_value_heads": 4}),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "seed_oss without biases": ("seed_oss", {"head_dim": 16, "attention_bias": False}),
    "ernie4_5": ("ernie4_5", {"head_dim": 24}),
    "ernie4_5 untied": ("ernie4_5", {"head_dim": 16, "tie_word_embeddings": False}),
    "helium": ("helium", {"head_dim": 16, "num_key_value_heads": 2}),
    "helium with biases": ("helium", {"head_dim": 16, "attention_bias": True}),
    "granite": ("granite", MULTIPLIED),
    "granite tied": ("granite", {**MULTIPLIED, "tie_word_embeddings": True}),
    "granite tied, all by one": ("granite", {"tie_word_embeddings": True}),
    "phi3, part of each head": ("phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.75}),
    "gpt2": ("gpt2", {}),
    "gpt2, wide and untied": ("gpt2", {
        "n_inner": 96, "activation_function": "relu", "tie_word_embeddings": False}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "nemotron": ("nemotron", {}),
    "nemotron, wider heads": ("nemotron", {"head_dim": 24, "partial_rotary_factor": 0.25}),
    "arcee": ("arcee", {}),
    "jais2": ("jais2", {}),
    "jais2 without biases": ("jais2", {"attention_bias": False, "mlp_bias": False}),
    "smollm3": ("smollm3", {"pad_token_id": 0}),
    "smollm3, other layers": ("smollm3", {"pad_token_id": 0, "no_rope_layers": [0, 1, 1, 0]}),
    "smollm3, rotary everywhere": ("smollm3", {"pad_token_id": 0, "no_rope_layers": [1, 1, 1, 1]}),
    "stablelm": ("stablelm", {}),
    "stablelm with biases": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 1.0}),
    "glm": ("glm", {"head_dim": 16, "pad_token_id": 0}),
    "glm without biases": ("glm", {"head_dim": 16, "pad_token_id": 0, "attention_bias": False}),
    "mixtral": ("mixtral", MIXTURE),
    "mixtral tied": ("mixtral", {**MIXTURE, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MIXTURE, "shared_expert_intermediate_size": 48}),
    "qwen2_moe, some layers dense": ("qwen2_moe", {
        **QWEN_MIXTURE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MIXTURE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, weights of all": ("qwen3_moe", {**QWEN_MIXTURE, "head_dim": 16}),
    "glm4_moe": ("glm4_moe", {**ROUTED, "use_qk_norm": True, "attention_bias": True, "head_dim": 16}),
    "glm4_moe, groups": ("glm4_moe", {
        **ROUTED, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "head_dim": 16,
        "routed_scaling_factor": 2.5}),
    "dots1": ("dots1", {**ROUTED, "first_k_dense_replace": 2, "n_shared_experts": 2, "head_dim": 16}),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **LATENT, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    "deepseek_v3, yarn": ("deepseek_v3", {
        **ROUTED, **LATENT, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}}),
    "deepseek_v2": ("deepseek_v2", {
        **ROUTED, **LATENT, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}),
    "deepseek_v2 lite": ("deepseek_v2", {**ROUTED, **LATENT, "norm_topk_prob": False, "q_lora_rank": None}),
    "glm4_moe_lite": ("glm4_moe_lite", {**ROUTED, **LATENT}),
    "gpt_oss": ("gpt_oss", {**MIXTURE, "head_dim": 16, "sliding_window": 16}),
    "gpt_oss, a window in no layer": ("gpt_oss", {**MIXTURE, "head_dim": 16, "layer_types": ["full_attention"] * 4}),
    "granitemoe": ("granitemoe", {**MULTIPLIED, **MIXTURE}),
    "granitemoe tied": ("granitemoe", {**MULTIPLIED, **MIXTURE, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "olmo3, yarn": ("olmo3", {"sliding_window": 16, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.2,
                           "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}}}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe, normed": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "glm4": ("glm4", {"head_dim": 16, "pad_token_id": 0}),
    "gemma2": ("gemma2", {"head_dim": 24, "sliding_window": 16, "final_logit_softcapping": 3.0,
                          "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}),
    "gemma2 without caps": ("gemma2", {"head_dim": 16, "sliding_window": 16, "final_logit_softcapping": None,
                                       "attn_logit_softcapping": None}),
    "gemma2, heads of 256": ("gemma2", {"head_dim": 256, "num_hidden_layers": 2}),
    "gemma3": ("gemma3_text", {"head_dim": 24, "sliding_window": 16, "num_hidden_layers": 4, "layer_types": [
        "sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 20}),
    "gemma3, scaled": ("gemma3_text", {"head_dim": 256, "num_hidden_layers": 6, "sliding_window": 20,
        "final_logit_softcapping": 4.0, "tie_word_embeddings": False, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "deepseek_v2, groups": ("deepseek_v2", {
        **ROUTED, **LATENT, "norm_topk_prob": False, "topk_method": "group_limited_greedy", "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 2.0}),
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma, legacy name": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "tie_word_embeddings": False}),
}
SHARED = {"llama", "mistral", "qwen2", "qwen3"}  # test_hf_configs.py
FOREIGN = {"kimi_k2"}  # transformers has it by the checkpoint's own code only; below


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def save_model(directory: Path, model_type: str, traits: dict[str, Any]) -> Any:
    """A small random model; norms and biases, which start as ones and zeros, are random too."""
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **(sizes | {"initializer_range": 0.2} | traits))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        choices = [buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name]
        for parameter in [*model.parameters(), *choices]:
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model


def loaded(directory: Path, groups: MedhaPGs) -> tuple[Any, ModelConfig]:
    config = read_model_config(directory)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    absorb_projections(model)
    return model, config


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path, groups: MedhaPGs) -> None:
    """Of two prompts, in chunks that share batches with the other's."""
    reference = save_model(tmp_path, *VARIANTS[name])
    ids = torch.randint(0, 101, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
    model, config = loaded(tmp_path, groups)
    run = PagedRun(model, config, block_size=16, num_slots=512)
    prompts = [run.add(each) for each in ids]
    for counts in ((40, 7), (1, 60), (49, 1), (0, 22)):
        run.step([(prompt, count) for prompt, count in zip(prompts, counts, strict=True) if count])
    for prompt, expected_TV in zip(prompts, expected, strict=True):
        actual_TV = torch.cat(prompt.logits)
        assert (actual_TV - expected_TV).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(actual_TV.argmax(-1), expected_TV.argmax(-1))


def test_every_family_is_compared_with_transformers() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} | SHARED | FOREIGN == set(FAMILIES)


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    save_model(tmp_path, *VARIANTS["deepseek_v3"])
    deepseek = read_hf_config(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "kimi_k2", "ep_size": 1}))
    assert read_hf_config(tmp_path) == deepseek


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - FOREIGN))
def test_absent_fields_mean_what_they_mean_to_transformers(model_type: str, tmp_path: Path) -> None:
    """Sizes apart, which no checkpoint leaves out."""
    sizes = {"vocab_size": 101, "hidden_size": 10240, "intermediate_size": 96, "num_hidden_layers": 4}
    sizes["num_attention_heads"] = 640  # all defaults of num_key_value_heads divide it
    if model_type == "gpt2":
        sizes = GPT2_SIZES

    def read(fields: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            return dataclasses.replace(read_hf_config(tmp_path), stop_token_ids=())
        except CheckpointError as error:  # against a window, or a size without a default
            return str(error)

    stated = transformers.AutoConfig.for_model(model_type, **sizes).to_dict()
    assert read({"model_type": model_type, **sizes}) == read(stated)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - SHARED))
def test_a_field_that_is_set_and_unknown_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    fields = {"model_type": model_type, **SIZES, "no_such_field": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match="no_such_field=1"):
        read_hf_config(tmp_path)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window of no token": ("ministral", {"sliding_window": 0}, "sliding_window=0"),
    "phi3 scaled": ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    "ernie with biases": ("ernie4_5", {"use_bias": True}, "use_bias=True"),
    "seed_oss, output bias": ("seed_oss", {"attention_out_bias": True}, "attention_out_bias=True"),
    "granite, biases": ("granite", {"attention_bias": True}, "attention_bias=True"),
    "granite, logits by a string": ("granite", {"logits_scaling": "8"}, "logits_scaling"),
    "gpt2, scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gpt2, an activation of its own": ("gpt2", {"activation_function": "mish"}, "mish"),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True"),
    "nemotron, part of a number": ("nemotron", {"partial_rotary_factor": 0.2}, "partial_rotary_factor=0.2"),
    "nemotron, attention bias": ("nemotron", {"attention_bias": True}, "attention_bias=True"),
    "jais2, half of the biases": ("jais2", {"mlp_bias": False}, "mlp_bias=False"),
    "smollm3, too few layers": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "gemma, both ways": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "granite's multiplier in a llama": ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_cannot_have_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, changes, told = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, "head_dim": 16, **changes}))
    with pytest.raises(CheckpointError, match=told):
        read_hf_config(tmp_path)


def test_a_fused_tensor_of_the_wrong_shape_is_named(tmp_path: Path, groups: MedhaPGs) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, *VARIANTS["phi3"])
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{key} has shape \[127, 64\], config.json says \[128, 64\]"):
        loaded(tmp_path, groups)


def test_a_mixture_of_30_billion_weights_has_the_shape_that_is_planned_with(tmp_path: Path) -> None:
    """config.json of Qwen3 30B-A3B, read as that of a tiny one, and the sizes of the same model in conf/model."""
    fields = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 262144, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape = read_hf_config(tmp_path).shape(2)
    conf = yaml.safe_load((Path(__file__).parents[2] / "conf/model/qwen3_30b_a3b.yaml").read_text())["shape"]
    assert {key: getattr(shape, key) for key in conf if key != "name"} == {k: v for k, v in conf.items() if k != "name"}
    assert shape.num_params / 1e9 == pytest.approx(30.53, abs=0.01)
    assert shape.num_active_params / 1e9 == pytest.approx(3.04, abs=0.01)


def test_deepseek_v3_has_its_671_billion_weights_and_a_latent_key_for_all_heads(tmp_path: Path) -> None:
    fields = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "vocab_size": 129280, "ep_size": 1, "moe_layer_freq": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16", "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_hf_config(tmp_path)
    assert config.shape(2).num_params / 1e9 == pytest.approx(671.0, abs=0.1)
    assert config.shape(2).num_active_params / 1e9 == pytest.approx(36.6, abs=0.1)
    assert config.shape(2).kv_bytes_per_token == 61 * 2 * 576 * 2
    assert config.max_context_len == 163840


STRANGE = (None, 0, -1, 1, 3, 1 << 40, 1.5, 1e300, "x", [], {}, True, False, [1, 1, 1, 1], {"a": 1}, ["dense"])


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - FOREIGN))
def test_a_strange_value_of_any_field_is_read_or_refused(model_type: str, tmp_path: Path) -> None:
    traits = next((traits for other, traits in VARIANTS.values() if other == model_type), {})
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    stated = transformers.AutoConfig.for_model(model_type, **(sizes | traits)).to_dict()
    draw = random.Random(model_type)
    for _ in range(150):
        changes = {draw.choice(list(stated)): draw.choice(STRANGE) for _ in range(draw.choice((1, 1, 2)))}
        (tmp_path / "config.json").write_text(json.dumps(stated | changes))
        with contextlib.suppress(CheckpointError):  # anything else is a fault of ours
            read_hf_config(tmp_path).shape(2)
