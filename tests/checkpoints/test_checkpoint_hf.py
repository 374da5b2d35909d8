"""Hugging Face checkpoints: the same logits as transformers, and errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config
from megatron_medha.checkpoints.hf_checkpoint import HUGGING_FACE
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.model.build import build_model
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama linear": {"model_type": "llama", "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama all heads": {"model_type": "llama", "num_key_value_heads": 4},
    "llama one kv head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 24},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 yarn": {"model_type": "qwen2", "rope_parameters": YARN_ROPE},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def make_checkpoint(directory: Path, max_shard_size: str = "5GB", **traits: Any) -> Any:
    """A small random model of transformers, saved there; norms and biases are random too, unlike its own start."""
    settings = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "eos_token_id": 2,
    } | traits  # fmt: skip
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def load(directory: Path, groups: MedhaPGs, dtype: torch.dtype = torch.float32) -> Any:
    config = read_model_config(directory)
    model = build_model(config, dtype=dtype, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    return model


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "DELETE"}))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, model_type="llama")
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, groups: MedhaPGs):
    reference = make_checkpoint(tmp_path, **MODELS[name])
    model = load(tmp_path, groups)
    ids = torch.randint(0, 101, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
        actual = model(ids, None, None)
    # fp32 sums in another order; transformers forms its angles in fp32, which at 90 tokens is as small.
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path, groups: MedhaPGs):
    reference = make_checkpoint(tmp_path, "100KB", model_type="llama")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path, groups)(ids, None, None), reference(ids).logits, atol=1e-4)


def test_weights_are_converted_to_the_models_dtype(llama: Path, groups: MedhaPGs):
    weights = load_file(llama / "model.safetensors")
    model = load(llama, groups, torch.bfloat16)
    assert torch.equal(model.embedding.word_embeddings.weight, weights["model.embed_tokens.weight"].bfloat16())


def test_progress_ends_at_one(llama: Path, groups: MedhaPGs):
    config = read_model_config(llama)
    fractions = []
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups)
    load_weights(model, config, llama, lambda what, fraction: fractions.append(fraction))
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_a_config_in_the_spelling_of_transformers_4_means_the_same(tmp_path: Path):
    make_checkpoint(tmp_path, model_type="llama", rope_parameters=LLAMA3_ROPE)
    newer = read_model_config(tmp_path)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_config(tmp_path, rope_parameters="DELETE", rope_theta=500000.0, rope_scaling=scaling)
    assert read_model_config(tmp_path) == newer
    edit_config(tmp_path, dtype="DELETE", torch_dtype="bfloat16")
    assert read_model_config(tmp_path).dtype == "bfloat16"


def test_an_old_llama_config_with_half_its_fields_gets_the_defaults(llama: Path):
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings", "dtype", "hidden_act"):
        edit_config(llama, **{key: "DELETE"})
    config = read_model_config(llama)
    assert (config.rope_theta, config.num_kv_heads, config.head_dim, config.dtype) == (10000.0, 4, 16, "float32")


def test_stop_tokens_come_from_both_configs(llama: Path):
    edit_config(llama, eos_token_id=[5, 2])
    (llama / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert read_model_config(llama).stop_token_ids == (7, 5, 2)


def test_ids_that_are_no_tokens_end_nothing(llama: Path):
    edit_config(llama, eos_token_id=-1)
    (llama / "generation_config.json").write_text('{"eos_token_id": [7, 1000000, -1]}')
    assert read_model_config(llama).stop_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba2"}, "model_type='mamba2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope'"),
        ({"rope_parameters": "DELETE", "rope_scaling": {"type": "su", "factor": 2.0}}, "type='su'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_run_is_refused_with_the_reason(changes: dict[str, Any], told: str, llama: Path):
    edit_config(llama, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        read_model_config(llama)
    assert told in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 256},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ],
)
def test_a_sliding_window_that_cuts_nothing_off_is_accepted(changes: dict[str, Any], llama: Path):
    edit_config(llama, layer_types="DELETE", **changes)
    read_model_config(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "DELETE"},
        {"hidden_size": "64"},
        {"num_hidden_layers": -1},
        {"num_attention_heads": True},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": float("nan")},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": "</s>"},
        {"rope_parameters": [1]},
    ],
)
def test_a_config_field_of_the_wrong_kind_is_named(changes: dict[str, Any], llama: Path):
    edit_config(llama, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_model_config(llama)
    assert "config.json" in str(caught.value) and next(iter(changes)) in str(caught.value)


def test_broken_json_is_named(llama: Path):
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        read_model_config(llama)


def test_a_missing_tensor_is_named(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model.layers.1.mlp.up_proj.weight is"):
        load(llama, groups)


def test_a_surplus_tensor_is_named(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model.layers.0.self_attn.q_proj.bias is"):
        load(llama, groups)


def test_a_tensor_of_the_wrong_shape_is_named_and_nothing_is_loaded(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.norm.weight": torch.zeros(65)})
    config = read_model_config(llama)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model.norm.weight has shape \[65\]"):
        load_weights(model, config, llama, lambda what, fraction: None)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_tensor_of_whole_numbers_is_refused(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="model.norm.weight has dtype I8"):
        load(llama, groups)


def test_tables_of_rotary_frequencies_are_passed_over(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(llama, groups)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_model_may_store_its_head_again_but_no_other(is_same: bool, tmp_path: Path, groups: MedhaPGs):
    make_checkpoint(tmp_path, model_type="llama", tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, **{"lm_head.weight": embedding.clone() if is_same else embedding + 1})
    if is_same:
        load(tmp_path, groups)
    else:
        with pytest.raises(CheckpointError, match="lm_head.weight differs"):
            load(tmp_path, groups)


@pytest.mark.parametrize("num_bytes_left", [0, 4, 100, 50_000])
def test_a_truncated_file_is_named(num_bytes_left: int, llama: Path, groups: MedhaPGs):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes_left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged"):
        load(llama, groups)


def test_a_missing_shard_is_named(tmp_path: Path, groups: MedhaPGs):
    make_checkpoint(tmp_path, "100KB", model_type="llama")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load(tmp_path, groups)


def scaled(model: Any, factor: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def assert_loads_what_transformers_does(directory: Path, groups: MedhaPGs) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        actual, expected = load(directory, groups)(ids, None, None), reference(ids).logits
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("first", "second"), [("60KB", "5GB"), ("5GB", "60KB"), ("60KB", "100KB")])
def test_of_two_saves_into_one_directory_the_one_transformers_takes_is_loaded(
    first: str, second: str, tmp_path: Path, groups: MedhaPGs
):
    model = make_checkpoint(tmp_path, first, model_type="llama")
    scaled(model, 1.1).save_pretrained(tmp_path, max_shard_size=second)
    assert_loads_what_transformers_does(tmp_path, groups)


def test_an_index_that_names_files_of_an_earlier_save_is_passed_over(llama: Path, groups: MedhaPGs):
    for stale in ('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}', "{"):
        (llama / "model.safetensors.index.json").write_text(stale)
        assert_loads_what_transformers_does(llama, groups)


def test_an_index_of_which_the_single_file_is_a_part_is_followed(tmp_path: Path, groups: MedhaPGs):
    reference = make_checkpoint(tmp_path, model_type="llama")
    tensors = load_file(tmp_path / "model.safetensors")
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file(norm, tmp_path / "norm.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(norm, "norm.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path, groups)(ids, None, None), reference(ids).logits, atol=1e-4)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tensor_in_two_shards_is_loaded_if_both_agree_and_refused_if_not(
    factor: int, tmp_path: Path, groups: MedhaPGs
):
    make_checkpoint(tmp_path, "60KB", model_type="llama")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor * factor}, second, metadata={"format": "pt"})
    if factor == 1:
        assert_loads_what_transformers_does(tmp_path, groups)
    else:
        with pytest.raises(CheckpointError, match=f"tensor {key} is in .* too, with other values"):
            load(tmp_path, groups)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_tied_model_may_store_its_head_alone(model_type: str, tmp_path: Path, groups: MedhaPGs):
    model = make_checkpoint(tmp_path, model_type=model_type, tie_word_embeddings=True)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    assert_loads_what_transformers_does(tmp_path, groups)


def test_an_untied_model_with_its_head_alone_is_refused(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"model.embed_tokens.weight": None})
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is missing"):
        load(llama, groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_in_one_line(value: float, llama: Path, groups: MedhaPGs):
    tensors = load_file(llama / "model.safetensors")
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    for name in names:
        tensors[name][3, 5] = value
    edit_tensors(llama, **tensors)
    with pytest.raises(CheckpointError, match=", ".join(names) + ": NaN or infinity.*take an earlier") as caught:
        load(llama, groups)
    assert "\n" not in str(caught.value)


def test_large_weights_whose_sum_overflows_are_numbers(llama: Path, groups: MedhaPGs):
    edit_tensors(llama, **{"lm_head.weight": torch.full((101, 64), 1e38)})
    load(llama, groups)


def test_what_is_no_checkpoint_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="torch_dist.*config.json"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        find_checkpoint(tmp_path)


def test_a_hugging_face_directory_is_recognised(llama: Path):
    assert find_checkpoint(llama)[0] is HUGGING_FACE
