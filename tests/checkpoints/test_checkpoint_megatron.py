"""Megatron torch_dist checkpoints: saved and loaded bit by bit, read as Megatron-LM writes them, damaged ones named."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import pickle
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config
from megatron_medha.checkpoints.megatron_checkpoint import MEGATRON, TRACKER_NAME, save_megatron_checkpoint
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_spec import RopeScaling
from megatron_medha.model.build import build_model
from megatron_medha.models.megatron_args import args_from_config
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed
from megatron_medha.safe_files.stored_tensors import StoredChunk, StoredTensor, TensorFiles
from megatron_medha.tiny.tiny_tokenizer import EOS_ID, save_tiny_tokenizer

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    name="small", num_layers=3, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=100, max_context_len=512, norm_epsilon=1e-6, rope_theta=10000.0,
)  # fmt: skip


class TrainingChoice(enum.Enum):
    """A class of somebody's training script, as its arguments may hold."""

    FAST = 1


class Malicious:
    """Unpickled plainly, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def random_model(groups: MedhaPGs, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = build_model(config, dtype=dtype, device=CPU, pgs=groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def load(directory: Path, groups: MedhaPGs, dtype: torch.dtype = torch.float32) -> Any:
    config = read_model_config(directory)
    model = build_model(config, dtype=dtype, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    return model


def assert_equal_weights(actual: Any, expected: Any) -> None:
    wanted = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == wanted.keys()
    for name, parameter in actual.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def save_like_megatron_lm(
    model: Any, directory: Path, *, prefix: str = "", metadata: dict[str, Any] | None = None, **args: Any
) -> Path:
    """What Megatron-LM's save_checkpoint leaves, with training's own state beside the model."""
    target = directory / "iter_0000020"
    target.mkdir(parents=True)
    state = model.sharded_state_dict(
        prefix=prefix, metadata={**(metadata or {}), "dp_cp_group": model.pg_collection.dp_cp}
    )
    namespace = args_from_config(CONFIG, torch.float32)
    vars(namespace).update(args)
    common = {"opt_param_scheduler": {"lr": 1e-4}, "checkpoint_version": 3.0, "iteration": 20, "args": namespace}
    dist_checkpointing.save({**common, "model": state, "content_metadata": metadata or {}}, str(target))
    (directory / TRACKER_NAME).write_text("20")
    return target


@pytest.fixture
def saved(tmp_path: Path, groups: MedhaPGs) -> Path:
    save_megatron_checkpoint(random_model(groups), CONFIG, tmp_path / "small", 100)
    return tmp_path / "small"


@pytest.mark.parametrize(
    "traits",
    [
        {},
        {"has_tied_embeddings": True, "has_qkv_bias": True},
        {"has_qk_norm": True, "num_kv_heads": 4, "head_dim": 24},
        {"num_kv_heads": 1, "rope_theta": 5e5, "stop_token_ids": ()},
        {"rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_max_context_len=8192)},
        {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
        {"dtype": "bfloat16"},
    ],
)
def test_what_was_saved_is_loaded_bit_by_bit(traits: dict[str, Any], tmp_path: Path, groups: MedhaPGs):
    config = dataclasses.replace(CONFIG, **traits)
    dtype = getattr(torch, config.dtype)
    model = random_model(groups, config, dtype)
    save_megatron_checkpoint(model, config, tmp_path / "small", 100)
    assert read_model_config(tmp_path / "small") == config
    assert_equal_weights(load(tmp_path / "small", groups, dtype), model)


def test_the_layout_of_the_directory_is_megatron_lms(saved: Path):
    assert find_checkpoint(saved)[0] is MEGATRON
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert json.loads((saved / "iter_0000100" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert dist_checkpointing.load_tensors_metadata(str(saved / "iter_0000100")).keys() == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
    }


def test_the_iterations_own_directory_can_be_named_too(saved: Path, groups: MedhaPGs):
    assert read_model_config(saved / "iter_0000100") == CONFIG
    assert_equal_weights(load(saved / "iter_0000100", groups), random_model(groups))


def test_a_release_checkpoint_is_found(saved: Path):
    (saved / "iter_0000100").rename(saved / "release")
    (saved / TRACKER_NAME).write_text("release\n")
    assert read_model_config(saved) == CONFIG


def test_weights_are_converted_to_the_models_dtype(saved: Path, groups: MedhaPGs):
    loaded = load(saved, groups, torch.bfloat16)
    expected = random_model(groups).decoder.layers[1].mlp.linear_fc1.weight.bfloat16()
    assert torch.equal(loaded.decoder.layers[1].mlp.linear_fc1.weight, expected)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("metadata", [{}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True}])
def test_every_way_megatron_names_its_tensors_is_read(
    prefix: str, metadata: dict[str, Any], tmp_path: Path, groups: MedhaPGs
):
    model = random_model(groups)
    save_like_megatron_lm(model, tmp_path / "small", prefix=prefix, metadata=metadata)
    assert_equal_weights(load(tmp_path / "small", groups), model)


def test_arguments_of_unknown_classes_do_no_harm(tmp_path: Path, groups: MedhaPGs):
    extra = {"attention_backend": TrainingChoice.FAST, "save": Path("/x"), "profile_ranks": [TrainingChoice.FAST]}
    save_like_megatron_lm(random_model(groups), tmp_path / "small", **extra)
    assert read_model_config(tmp_path / "small").num_layers == 3


def test_arguments_in_a_simple_namespace_are_read_too(saved: Path):
    path = saved / "iter_0000100" / "common.pt"
    common = torch.load(path, weights_only=False)
    torch.save(common | {"args": types.SimpleNamespace(**vars(common["args"]))}, path)
    assert read_model_config(saved) == CONFIG


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, groups: MedhaPGs):
    model = random_model(groups)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")
    save_megatron_checkpoint(model, CONFIG, tmp_path / "small", 100)
    with pytest.raises(CheckpointError, match=r"iter_0000100: decoder.layers.mlp.linear_fc2.weight: NaN or infinity"):
        load(tmp_path / "small", groups)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, groups: MedhaPGs):
    target = save_like_megatron_lm(random_model(groups), tmp_path / "small")
    common = torch.load(target / "common.pt", weights_only=False)
    torch.save(common | {"evil": Malicious(tmp_path / "common was run")}, target / "common.pt")
    read_model_config(tmp_path / "small")
    (target / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "metadata was run")))
    with pytest.raises(CheckpointError, match=r"\.metadata.*does not belong"):
        read_model_config(tmp_path / "small")
    assert not list(tmp_path.glob("*was run"))


def test_a_padded_vocabulary_is_cut_to_the_true_one(tmp_path: Path, groups: MedhaPGs):
    padded = random_model(groups, dataclasses.replace(CONFIG, vocab_size=128))
    save_like_megatron_lm(padded, tmp_path / "small", vocab_size=100, padded_vocab_size=128)
    loaded = load(tmp_path / "small", groups)
    assert read_model_config(tmp_path / "small").vocab_size == 100
    assert torch.equal(loaded.output_layer.weight[:100], padded.output_layer.weight[:100])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, None, None)[..., :100], padded(ids, None, None)[..., :100])


@pytest.mark.parametrize(
    ("args", "vocab_size"),
    [
        ({"vocab_size": None}, 128),
        ({"vocab_size": 99, "tokenizer_type": "NullTokenizer"}, 100),
        ({"vocab_size": 100, "tokenizer_type": "HuggingFaceTokenizer"}, 100),
    ],
)
def test_the_true_vocabulary_is_found(args: dict[str, Any], vocab_size: int, tmp_path: Path, groups: MedhaPGs):
    model = random_model(groups, dataclasses.replace(CONFIG, vocab_size=128))
    save_like_megatron_lm(model, tmp_path / "small", **args)
    assert read_model_config(tmp_path / "small").vocab_size == vocab_size


def test_the_tokenizer_beside_it_gives_vocabulary_and_end_token(tmp_path: Path, groups: MedhaPGs):
    model = random_model(groups, dataclasses.replace(CONFIG, vocab_size=320))
    save_like_megatron_lm(model, tmp_path / "small", vocab_size=None)
    save_tiny_tokenizer(tmp_path / "small", 512)
    (tmp_path / "small" / "generation_config.json").write_text('{"eos_token_id": [-1, 1000000]}')
    config = read_model_config(tmp_path / "small")
    assert (config.vocab_size, config.stop_token_ids) == (264, (EOS_ID,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative"),
        ("normalization", "L2Norm"),
        ("experimental_attention_variant", "dsa"),
        ("rotary_base_per_layer", [10000, 500000]),
        ("use_mup", True),
        ("apply_residual_connection_post_layernorm", True),
        ("spec", ["my.module", "layer_spec"]),
    ],
)
def test_a_model_that_cannot_run_is_refused_with_the_reason(key: str, value: Any, saved: Path):
    path = saved / "iter_0000100" / "common.pt"
    common = torch.load(path, weights_only=False)
    setattr(common["args"], key, value)
    torch.save(common, path)
    with pytest.raises(UnsupportedModelError, match=rf"common\.pt: args\.{key}="):
        read_model_config(saved)


@pytest.mark.parametrize(("key", "value"), [("num_layers", None), ("hidden_size", "64"), ("rotary_base", -1.0)])
def test_an_argument_of_the_wrong_kind_is_named(key: str, value: Any, saved: Path):
    path = saved / "iter_0000100" / "common.pt"
    common = torch.load(path, weights_only=False)
    setattr(common["args"], key, value)
    torch.save(common, path)
    with pytest.raises(CheckpointError, match=rf"common\.pt: args\.{key}"):
        read_model_config(saved)


def test_a_checkpoint_without_arguments_says_so(saved: Path):
    torch.save({"iteration": 100}, saved / "iter_0000100" / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: holds no 'args'"):
        read_model_config(saved)


def test_weights_of_another_shape_than_the_arguments_are_named(saved: Path, groups: MedhaPGs):
    config = dataclasses.replace(read_model_config(saved), ffn_hidden_size=128)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups)
    with pytest.raises(CheckpointError, match=r"decoder.layers.mlp.linear_fc2.weight has shape \[3, 64, 96\]"):
        load_weights(model, config, saved, lambda what, fraction: None)


@pytest.mark.parametrize(
    ("traits", "told"),
    [
        ({"has_qk_norm": True}, "decoder.layers.self_attention.q_layernorm.weight is missing"),
        ({"has_tied_embeddings": True}, "output_layer.weight is not part of this model"),
    ],
)
def test_missing_and_surplus_tensors_are_named(traits: dict[str, Any], told: str, saved: Path, groups: MedhaPGs):
    config = dataclasses.replace(CONFIG, **traits)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups)
    with pytest.raises(CheckpointError, match=rf"\.metadata: tensor {told}"):
        load_weights(model, config, saved, lambda what, fraction: None)


@pytest.mark.parametrize("num_bytes_left", [0, 100])
@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp"])
def test_a_truncated_file_is_named(name: str, num_bytes_left: int, saved: Path, groups: MedhaPGs):
    path = saved / "iter_0000100" / name
    path.write_bytes(path.read_bytes()[: min(num_bytes_left, path.stat().st_size - 1)])
    with pytest.raises(CheckpointError) as caught:
        load(saved, groups)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json", "__0_0.distcp"])
def test_a_missing_file_is_named(name: str, saved: Path, groups: MedhaPGs):
    (saved / "iter_0000100" / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(saved, groups)
    assert name in str(caught.value)


def test_a_tracker_that_names_nothing_is_named(saved: Path):
    shutil.rmtree(saved / "iter_0000100")
    with pytest.raises(CheckpointError, match="iter_0000100: no such directory"):
        find_checkpoint(saved)
    (saved / TRACKER_NAME).write_text("soon")
    with pytest.raises(CheckpointError, match=TRACKER_NAME):
        find_checkpoint(saved)


def test_older_and_other_formats_say_how_to_convert(saved: Path):
    path = saved / "iter_0000100" / "metadata.json"
    path.write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="zarr.*--ckpt-convert-format torch_dist"):
        find_checkpoint(saved)
    path.unlink()
    (saved / "iter_0000100" / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointError, match="older 'torch' format"):
        find_checkpoint(saved)


def test_a_scaling_megatron_cannot_state_is_not_saved(tmp_path: Path, groups: MedhaPGs):
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_context_len=64))
    with pytest.raises(UnsupportedModelError, match="yarn"):
        args_from_config(config, torch.float32)


def test_the_arguments_are_a_plain_namespace():
    assert type(args_from_config(CONFIG, torch.float32)) is argparse.Namespace


def test_a_chunk_that_was_read_no_longer_counts_as_memory_of_the_process(tmp_path: Path):
    path = tmp_path / "__0_0.distcp"
    torch.save(torch.arange(1 << 20), path)
    size = path.stat().st_size
    chunk = StoredChunk((0,), (1 << 20,), path, 0, size)
    target, files = torch.empty(1 << 20, dtype=torch.int64), TensorFiles()
    files.fill(target, [0], StoredTensor((1 << 20,), torch.int64, (chunk,), 1 << 20))
    assert torch.equal(target, torch.arange(1 << 20))
    mapped = Path("/proc/self/smaps").read_text().partition(str(path))[2].partition("Rss:")[2]
    assert int(mapped.split()[0]) * 1024 < size / 10
