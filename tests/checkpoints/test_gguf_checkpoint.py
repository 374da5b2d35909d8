"""GGUF files: the logits of transformers, the tokenizer in the file, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'megatron_medha[gguf]'")
transformers = pytest.importorskip("transformers")
from megatron_medha.checkpoints.detect import find_checkpoint, load_weights, read_model_config  # noqa: E402
from megatron_medha.checkpoints.gguf_checkpoint import GGUF  # noqa: E402
from megatron_medha.core.errors import CheckpointError, UnsupportedModelError  # noqa: E402
from megatron_medha.core.layout import ParallelLayout  # noqa: E402
from megatron_medha.model.build import build_model  # noqa: E402
from megatron_medha.models.tokenizer_facts import tokenizer_facts  # noqa: E402
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed  # noqa: E402
from megatron_medha.text.tokenizer import Tokenizer  # noqa: E402
from tests.checkpoints.gguf_files import write_gguf  # noqa: E402
from tests.model.paged_run import PagedRun  # noqa: E402

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied, wide heads": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 32},
    "llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "llama with experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2moe": {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "head_dim": 32, "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


def random_model(**traits: Any) -> Any:
    settings = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    } | traits  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(path, random_model(model_type="llama"))
    return path


def logits(path: Path, groups: MedhaPGs, ids: torch.Tensor) -> torch.Tensor:
    config = read_model_config(path)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, path, lambda what, fraction: None)
    with torch.no_grad():
        return model(ids, None, None)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, groups: MedhaPGs) -> None:
    model = random_model(**MODELS[name])
    write_gguf(tmp_path / "small.gguf", model)
    ids = torch.randint(0, 259, (1, 40))
    with torch.no_grad():
        theirs = model(ids).logits
    torch.testing.assert_close(logits(tmp_path / "small.gguf", groups, ids), theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "quantised", "is_stacked"),
    [*((name, kind, True) for name in MIXTURES for kind in ("F32", "Q8_0")), ("llama with experts", "F32", False)],
)
def test_logits_of_experts_are_those_of_transformers(
    name: str, quantised: str, is_stacked: bool, tmp_path: Path, groups: MedhaPGs
) -> None:
    reference = random_model(**MIXTURES[name])
    path = tmp_path / "small.gguf"
    write_gguf(path, reference, quantised=quantised, is_stacked=is_stacked)
    if quantised != "F32":
        _round(reference, quantised)
    config = read_model_config(path)
    model = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(model, config, path, lambda what, fraction: None)
    ids = torch.randint(0, 259, (40,), generator=torch.Generator().manual_seed(1))
    run = PagedRun(model, config, block_size=16, num_slots=128)
    prompt = run.add(ids)
    for count in (25, 1, 14):
        run.step([(prompt, count)])
    with torch.no_grad():
        theirs = reference(ids[None]).logits[0]
    assert (torch.cat(prompt.logits) - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _round(model: Any, kind: str) -> None:
    """Matrices to what the file holds of them; vectors, and the gate of one row, are stored as floats."""
    to = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[0] > 1:
                stored = gguf.quants.quantize(parameter.numpy(), to)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, to)))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_the_floats_of_the_gguf_package(kind: str, tmp_path: Path, groups: MedhaPGs) -> None:
    model = random_model(model_type="qwen2")
    write_gguf(tmp_path / "small.gguf", model, quantised=kind)
    floats = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(str(tmp_path / "small.gguf")).tensors
    }
    config = read_model_config(tmp_path / "small.gguf")
    ours = build_model(config, dtype=torch.float32, device=CPU, pgs=groups, is_initialized=False)
    load_weights(ours, config, tmp_path / "small.gguf", lambda what, fraction: None)
    assert torch.equal(ours.embedding.word_embeddings.weight, floats["token_embd.weight"].float())
    fc1 = ours.decoder.layers[1].mlp.linear_fc1.weight
    assert torch.equal(fc1, torch.cat((floats["blk.1.ffn_gate.weight"], floats["blk.1.ffn_up.weight"])).float())
    assert config.dtype == {"F16": "float16"}.get(kind, "bfloat16")


def test_the_tokenizer_and_the_chat_template_are_in_the_file(llama: Path) -> None:
    tokenizer = Tokenizer.load(llama)
    ids = tokenizer.encode("the thing<|end|>").tolist()
    assert ids[0] == 257 and ids[-1] == 258 and tokenizer.eos_token_id == 258
    assert tokenizer.decode(ids[:-1]) == "the thing"
    assert not tokenizer.template.is_plain
    assert tokenizer_facts(llama) == (259, (258,))
    assert read_model_config(llama).stop_token_ids == (258,)


def test_the_only_file_of_a_directory_is_found_and_of_several_one_must_be_named(llama: Path) -> None:
    assert find_checkpoint(llama) == (GGUF, llama) == find_checkpoint(llama.parent)
    llama.with_name("other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: other\.gguf, small\.gguf\. Name one"):
        find_checkpoint(llama.parent)


def test_a_file_cut_off_anywhere_is_named(llama: Path, tmp_path: Path) -> None:
    content = llama.read_bytes()
    path = tmp_path / "cut" / "cut.gguf"
    path.parent.mkdir()
    for place in [*range(0, 400, 7), *range(400, len(content) - 40, len(content) // 60)]:
        path.write_bytes(content[:place])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_model_config(path)


def test_random_bytes_changed_in_the_head_end_in_one_error_or_a_model(llama: Path, tmp_path: Path) -> None:
    import random

    drawn = random.Random(0)
    content = llama.read_bytes()
    path = tmp_path / "changed" / "changed.gguf"
    path.parent.mkdir()
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(drawn.randrange(1, 4)):
            changed[drawn.randrange(4000)] = drawn.randrange(256)
        path.write_bytes(changed)
        for read in (read_model_config, Tokenizer.load):
            try:
                read(path)
            except CheckpointError:
                pass


def test_a_claim_of_billions_of_items_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    key = b"general.architecture"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, 1 << 60)
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="more than 4000000; damaged"):
        read_model_config(path)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"expert_weights_scale": 2.0}, "llama.expert_weights_scale=2.0 is not supported: this field is not known"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
    ],
)
def test_a_model_that_is_not_served_is_refused_with_the_reason(more: dict[str, Any], why: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf", random_model(model_type="llama"), more=more)
    with pytest.raises(UnsupportedModelError, match=why):
        read_model_config(tmp_path / "small.gguf")


def test_another_architecture_is_refused_with_a_way_out(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "small.gguf"), "mamba")
    writer.add_block_count(2)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="general.architecture='mamba' is not supported.*Take the safetens"):
        read_model_config(tmp_path / "small.gguf")
