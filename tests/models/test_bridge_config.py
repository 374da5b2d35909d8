"""Checkpoints of Megatron-Bridge: run_config.yaml read as Megatron-LM's arguments are, and as strictly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.checkpoints.megatron_checkpoint import save_megatron_checkpoint
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import Experts, LatentAttention, RopeScaling
from megatron_medha.model.build import build_model
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from megatron_medha.tiny.tiny_tokenizer import save_tiny_tokenizer

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    name="small", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=100, max_context_len=4096, norm_epsilon=1e-6, rope_theta=500000.0,
)  # fmt: skip
# What Bridge's GPTModelProvider has beside the fields of TransformerConfig, as it writes them.
PROVIDER = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "fp16_lm_cross_entropy": False,
    "parallel_output": True, "make_vocab_size_divisible_by": 128, "rotary_percent": 1.0, "rope_scaling": False,
    "rope_scaling_factor": 1.0, "rotary_scaling_factor": None, "seq_len_interpolation_factor": None,
    "yarn_beta_fast": None, "deallocate_pipeline_outputs": True, "scatter_embedding_sequence_parallel": True,
    "tp_only_amax_red": False, "tp_comm_overlap_cfg": None, "use_transformer_engine_full_layer_spec": False,
    "transformer_layer_spec": {"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False},
    "generation_config": {"_target_": "transformers.GenerationConfig.from_dict", "_call_": True, "config_dict": {}},
    "hf_model_id": "meta-llama/Llama-3.2-1B", "should_pad_vocab": True, "moe_grouped_gemm": False,
    "mtp_enabled": False, "use_te_rng_tracker": False, "cross_entropy_loss_fusion": True,
    "gradient_accumulation_fusion": True, "restore_modelopt_state": False, "use_arbitrary_attention_mask": None,
    "bias_activation_fusion": True, "persist_layer_norm": True, "position_embedding_type": "rope",
}  # fmt: skip
SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}


def plain(value: Any) -> Any:
    """As Bridge writes it: classes, functions and dtypes by name."""
    if isinstance(value, bool | int | float | str | list | None):
        return value
    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", "_call_": True}


def model_section(config: ModelConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    """All fields of a provider, with the values that make it this model."""
    fields = {
        field.name: None if field.default is dataclasses.MISSING else plain(field.default)
        for field in dataclasses.fields(TransformerConfig)
    }
    return fields | PROVIDER | {
        "num_layers": config.num_layers, "hidden_size": config.hidden_size, "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads, "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim, "vocab_size": config.vocab_size, "seq_length": config.max_context_len,
        "layernorm_epsilon": config.norm_epsilon, "rotary_base": config.rope_theta, "normalization": "RMSNorm",
        "activation_func": SILU, "gated_linear_unit": True, "add_bias_linear": False,
        "add_qkv_bias": config.has_qkv_bias, "qk_layernorm": config.has_qk_norm, "bf16": True,
        "share_embeddings_and_output_weights": config.has_tied_embeddings,
        "params_dtype": plain(torch.bfloat16), "hidden_dropout": 0.0, "tensor_model_parallel_size": 2,
    } | changes  # fmt: skip


def write(directory: Path, model: Any) -> None:
    path = next(directory.glob("iter_*")) / "run_config.yaml"
    path.write_text(yaml.safe_dump({"_target_": "megatron.bridge.training.config.ConfigContainer", "model": model}))


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def save(directory: Path, groups: MedhaPGs, config: ModelConfig = CONFIG) -> Any:
    """A checkpoint as Bridge leaves it: no arguments in common.pt."""
    torch.manual_seed(0)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups)
    step = save_megatron_checkpoint(model, dataclasses.replace(config, rope_scaling=RopeScaling()), directory, 5)
    torch.save({"iteration": 5, "checkpoint_version": 3.0}, step / "common.pt")
    write(directory, model_section(config))
    return model


@pytest.fixture
def saved(tmp_path: Path, groups: MedhaPGs) -> Path:
    save(tmp_path / "small", groups)
    return tmp_path / "small"


@pytest.mark.parametrize(
    "traits", [{}, {"has_tied_embeddings": True, "has_qkv_bias": True}, {"has_qk_norm": True, "head_dim": 24}]
)
def test_a_checkpoint_of_bridge_is_read_from_its_run_config(
    traits: dict[str, Any], tmp_path: Path, groups: MedhaPGs
):
    config = dataclasses.replace(CONFIG, **traits)
    model = save(tmp_path / "small", groups, config)
    found = read_model_config(tmp_path / "small")
    assert found == config
    loaded = build_model(found, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(loaded, found, tmp_path / "small", lambda what, fraction: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, RopeScaling(
            kind="llama3", factor=32.0, original_max_context_len=8192)),
        ({"seq_len_interpolation_factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B", "scale_factor": 8.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192},
         RopeScaling(kind="llama3", factor=8.0, original_max_context_len=8192)),
    ],
)  # fmt: skip
def test_each_way_to_state_rotary_scaling_is_read(changes: dict[str, Any], scaling: RopeScaling, saved: Path):
    write(saved, model_section(**changes))
    assert read_model_config(saved) == dataclasses.replace(CONFIG, rope_scaling=scaling)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_channels": None, "softmax_scale": 16**-0.5},
        {"_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider600M"},
        {"_target_": "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"},
        {"activation_func": "silu", "fp8": "hybrid", "recompute_granularity": "full", "cpu_offloading": True},
        {"attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_args_": [3]}},
    ],
)
def test_fields_that_leave_the_answers_alone_are_passed_over(changes: dict[str, Any], saved: Path):
    write(saved, model_section(**changes))
    assert read_model_config(saved) == CONFIG


@pytest.mark.parametrize(
    ("changes", "traits"),
    [
        ({"layernorm_zero_centered_gamma": True, "normalization": "LayerNorm"},
         {"has_zero_centred_norms": True, "has_layer_norms": True}),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}}, {"activation": "gelu_tanh"}),
        ({"activation_func": "gelu", "gated_linear_unit": False}, {"activation": "gelu", "has_gate": False}),
        ({"activation_func": "gelu", "gated_linear_unit": False, "add_bias_linear": True},
         {"activation": "gelu_tanh", "has_gate": False, "has_linear_biases": True}),
        ({"activation_func": "megatron.core.activations.squared_relu", "gated_linear_unit": False},
         {"activation": "squared_relu", "has_gate": False}),
        ({"activation_func": "megatron.core.fusions.fused_bias_geglu.quick_gelu", "glu_linear_offset": 1.0},
         {"activation": "quick_gelu", "gate_offset": 1.0}),
        ({"rotary_percent": 0.5, "rotary_interleaved": True}, {"rotary_dim": 8, "is_rotary_interleaved": True}),
        ({"softmax_scale": 0.5}, {"softmax_scale": 0.5}),
        ({"softmax_type": "learnable"}, {"softmax": "sinks"}),
        ({"window_size": [127, 0], "window_attn_skip_freq": 2}, {"window": 128, "window_layers": (True, False)}),
        ({"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_layer_freq": [0, 1],
          "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
         {"experts": Experts(num_experts=8, num_per_token=2, ffn_hidden_size=48, layers=(False, True), score="sigmoid",
                             has_choice_bias=True)}),
        ({"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 8.0,
          "yarn_original_max_position_embeddings": 512, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0},
         {"rope_scaling": RopeScaling(kind="yarn", factor=8.0, original_max_context_len=512, attention_factor=1.0)}),
    ],
)  # fmt: skip
def test_traits_are_read_by_the_names_of_transformer_config(
    changes: dict[str, Any], traits: dict[str, Any], saved: Path
):
    write(saved, model_section(**changes))
    assert read_model_config(saved) == dataclasses.replace(CONFIG, **traits)


def test_a_model_of_deepseeks_is_read_from_its_provider(saved: Path):
    of_latent = {field.name: plain(field.default) for field in dataclasses.fields(MLATransformerConfig)}
    deepseek = {
        "_target_": "megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3ModelProvider",
        "transformer_layer_spec": {
            "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec", "_partial_": True,
            "_args_": [], "use_transformer_engine": True,
        },
        "multi_latent_attention": True, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "rotary_scaling_factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "qk_layernorm": True, "num_moe_experts": 8, "moe_router_topk": 2, "moe_layer_freq": [0, 1],
        "moe_ffn_hidden_size": 32,
    }  # fmt: skip
    plain_fields = model_section()
    write(saved, of_latent | plain_fields | deepseek)
    temperature = 0.1 * math.log(40) + 1
    assert read_model_config(saved) == dataclasses.replace(
        CONFIG, num_kv_heads=4, head_dim=24, has_qk_norm=True, is_rotary_interleaved=True,
        softmax_scale=temperature**2 * 24**-0.5,
        latent=LatentAttention(q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
        rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_max_context_len=4096, attention_factor=1.0),
        experts=Experts(num_experts=8, num_per_token=2, ffn_hidden_size=32, layers=(False, True)),
    )  # fmt: skip


def test_the_nested_form_of_newer_versions_means_the_same(saved: Path):
    flat = model_section(_target_="megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig")
    inner = {field.name for field in dataclasses.fields(TransformerConfig)}
    transformer = {name: value for name, value in flat.items() if name in inner}
    transformer["_target_"] = "megatron.core.transformer.transformer_config.TransformerConfig"
    write(saved, {name: flat[name] for name in flat.keys() - inner} | {"transformer": transformer})
    assert read_model_config(saved) == CONFIG


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_func", {"_target_": "torch.nn.functional.mish", "_call_": False}),
        ("gated_linear_unit", False),
        ("normalization", "L2Norm"),
        ("position_embedding_type", "relative"),
        ("linear_attention_freq", 4),
        ("glu_linear_offset", 1.0),
        ("qk_l2_norm", True),
        ("heterogeneous_block_specs", True),
        ("restore_modelopt_state", True),
        ("scale_embeddings_of_a_later_version", 8.0),
        ("_target_", "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"),
        ("_target_", "megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider30B_A3B_x.Evil"),
        ("transformer_layer_spec", {"_target_": "my.script.layer_spec", "_call_": False}),
    ],
)
def test_what_changes_the_answers_or_is_unknown_is_refused_with_its_name(name: str, value: Any, saved: Path):
    write(saved, model_section(**{name: value}))
    told = {"gated_linear_unit": "activation_func"}.get(name, name)
    with pytest.raises(UnsupportedModelError, match=rf"run_config\.yaml: model\.{told}="):
        read_model_config(saved)


def as_nemo(saved: Path, **changes: Any) -> Path:
    """The same checkpoint as NeMo 2 leaves it."""
    home = saved.parent / "nemo"
    next(saved.glob("iter_*")).rename(home.mkdir() or home / "weights")
    (home / "weights" / "run_config.yaml").unlink()
    config = model_section(
        _target_="nemo.collections.llm.gpt.model.llama.Llama32Config1B",
        transformer_layer_spec={"_target_": "nemo.collections.llm.gpt.model.base.default_layer_spec", "_call_": False},
        forward_step_fn={"_target_": "nemo.collections.llm.gpt.model.base.gpt_forward_step", "_call_": False},
        **changes,
    )
    del config["vocab_size"]
    (home / "context" / "nemo_tokenizer").mkdir(parents=True)
    save_tiny_tokenizer(home / "context" / "nemo_tokenizer", 512)
    model = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": config, "tokenizer": {}}
    (home / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return home


def test_a_checkpoint_of_nemo_2_is_read_from_its_context(tmp_path: Path, groups: MedhaPGs):
    config = dataclasses.replace(CONFIG, vocab_size=264)
    model = save(tmp_path / "small", groups, config)
    home = as_nemo(tmp_path / "small")
    found = read_model_config(home)
    assert dataclasses.replace(found, stop_token_ids=()) == dataclasses.replace(config, name="nemo")
    assert found.stop_token_ids  # of the tokenizer in its context
    loaded = build_model(found, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(loaded, found, home, lambda what, fraction: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear_attention_freq": 4}, "config.linear_attention_freq=4"),
        ({"of_a_later_version": 1}, "config.of_a_later_version=1"),
        ({"activation_func": "mish"}, "config.activation_func"),
    ],
)
def test_what_nemo_2_states_is_read_as_strictly(changes: dict[str, Any], told: str, saved: Path):
    with pytest.raises(UnsupportedModelError, match=rf"context/model\.yaml: {told}"):
        read_model_config(as_nemo(saved, **changes))


def test_another_scaling_of_rotary_frequencies_is_refused(saved: Path):
    write(saved, model_section(scale_factor=8.0, low_freq_factor=2.0, high_freq_factor=4.0, old_context_len=8192))
    with pytest.raises(UnsupportedModelError, match="low_freq_factor=2.0"):
        read_model_config(saved)


def test_missing_fields_are_all_named(saved: Path):
    write(saved, {"num_layers": 2, "hidden_size": 64})
    told = r"run_config\.yaml: .*model\.layernorm_epsilon.*model\.rotary_base.*missing"
    with pytest.raises(CheckpointError, match=told):
        read_model_config(saved)


def test_the_config_of_the_same_model_says_what_the_run_config_does_not(saved: Path):
    fields = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (saved / "config.json").write_text(json.dumps(fields))
    for stated in ({"num_layers": 2, "hidden_size": 64}, {}):
        write(saved, stated)
        assert read_model_config(saved) == CONFIG
    next(saved.glob("iter_*/run_config.yaml")).unlink()
    assert read_model_config(saved) == CONFIG
    write(saved, {"rotary_base": 10000.0})
    with pytest.raises(CheckpointError, match=r"config\.json: says rotary_base=500000.0, run_config.yaml says 10000.0"):
        read_model_config(saved)


def test_the_tokenizer_that_bridge_saves_gives_the_end_token(saved: Path, groups: MedhaPGs):
    step = next(saved.glob("iter_*"))
    (step / "tokenizer").mkdir()
    save_tiny_tokenizer(step / "tokenizer", 512)
    path = step / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|eos|>", "A"))
    assert read_model_config(saved).stop_token_ids == (ord("A"),)  # its own end token is beyond this vocabulary


def test_the_iteration_is_found_without_megatron_lms_tracker_file(saved: Path):
    (saved / "latest_checkpointed_iteration.txt").unlink()
    torch.save({"step": torch.tensor(5, dtype=torch.int32)}, saved / "latest_train_state.pt")
    assert read_model_config(saved) == CONFIG
    torch.save({"step": "5"}, saved / "latest_train_state.pt")
    with pytest.raises(CheckpointError, match=r"latest_train_state\.pt: holds no 'step'"):
        read_model_config(saved)


LAUGHS = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in zip("abcdefghi", "bcdefghij")
)

ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "content",
    [
        ALIASES + "model: {_target_: *a59}",
        "model: &model {_target_: *model}",
        "model: !!python/object/apply:os.system ['touch pwned']",
        "model: " + "[" * 100_000,
        "model: " + "{a: " * 3000 + "1" + "}" * 3000,
        LAUGHS,
        "model: {num_layers: " + "9" * 10_000 + "}",
        "x" * (2 << 20),
        "- 1",
        "model: 1",
        "model: {? [a, b] : 1}",
        "\0",
    ],
)
def test_a_hostile_or_broken_run_config_is_refused_by_its_name(content: str, saved: Path):
    next(saved.glob("iter_*/run_config.yaml")).write_text(content)
    with pytest.raises(CheckpointError, match=r"run_config\.yaml") as caught:
        read_model_config(saved)
    assert len(str(caught.value)) < 2000
