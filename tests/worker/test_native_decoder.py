"""Whole steps in one native call against the same model's layers called one by one: equal to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels import native_build
from megatron_medha.kernels.linear.native_linear import NativeLinear
from megatron_medha.kernels.native_build import NativeUnavailable, native_library, native_target, usable_targets
from megatron_medha.model import packed_linear
from megatron_medha.model.cpu_model import NativeForward
from megatron_medha.model.narrow_weights import int4_linear


@pytest.fixture(autouse=True)
def _native_library() -> None:
    try:
        native_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def load(tmp_path: Path, rank_config: RankConfig, front_of: Callable[[RankConfig], Any]) -> Callable[..., Any]:
    """Makes a tiny random model of some kind, and a bf16 rank of it."""

    def load(kind: str, ffn_size: int = 104, **options: Any) -> Any:
        save_tiny(kind, tmp_path, ffn_size)
        front = front_of(
            msgspec.structs.replace(
                rank_config,
                checkpoint=str(tmp_path),
                model=dataclasses.replace(rank_config.model, dtype="bfloat16", **{"num_threads": 2, **options}),
            )
        )
        front.short_way = front.rank._plain_decodes
        front.rank._plain_decodes = None  # they pass the model's forward by: test_run_ahead.py
        return front

    return load


GPT2 = {
    "n_embd": 72, "n_layer": 3, "n_head": 6, "n_positions": 512, "n_inner": 104, "initializer_range": 0.2,
}  # fmt: skip
# Beside the sizes below: layers that are not Llama's.
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2": GPT2,
    "Starcoder2": {},
    "Nemotron": {"partial_rotary_factor": 0.5},
    "Phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "hidden_size": 96},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "Qwen2Moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True},
}  # fmt: skip


def save_tiny(kind: str, directory: Path, ffn_size: int) -> None:
    """A checkpoint of transformers' model of that kind."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    model_class = transformers.GPT2LMHeadModel if kind == "GPT2" else getattr(transformers, f"{kind}ForCausalLM")
    sizes = {
        "hidden_size": 72, "intermediate_size": ffn_size, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512, "initializer_range": 0.2,
        "tie_word_embeddings": kind == "Qwen3",
    }  # fmt: skip
    if kind in ("Phi3", "Qwen2Moe"):
        del sizes["head_dim"]  # it follows from the others
    more = OTHERS.get(kind, {})
    given = more if kind == "GPT2" else {**sizes, **more}
    config = config_class(vocab_size=300, bos_token_id=1, eos_token_id=2, **given)
    model = model_class(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms and biases begin as ones and zeros, which hide a missing one
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            torch.nn.init.uniform_(weight, 0.5, 1.5) if is_norm else torch.nn.init.normal_(weight)
    model.to(torch.bfloat16).save_pretrained(directory)


def all_logits(front: Any) -> list[torch.Tensor]:
    """Of mixed steps: prompts in pieces beside decodes."""
    found: list[torch.Tensor] = []
    hook = front.rank.model.register_forward_hook(lambda model, args, output: found.append(output.clone()))
    prompts = {"a": 5, "b": 90, "c": 33}
    new = [front.new(name, [3 + (7 * i) % 290 for i in range(length)]) for name, length in prompts.items()]
    first = [front.first(name, min(length, 40), room=200, samples=length <= 40) for name, length in prompts.items()]
    front.step(first, new)
    front.step([Chunk("b", 40, 50, True), Chunk("a", 5, 1, True), Chunk("c", 33, 1, True)])
    for step in range(4):
        front.step(
            [Chunk(name, length + step + (name != "b"), 1, True) for name, length in prompts.items()]
        )
    front.step(released=list(prompts))
    hook.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "weights"), [("Llama", "auto"), ("Qwen2", "auto"), ("Qwen3", "auto"), ("Qwen2", "int8"), ("Qwen3", "int4")]
)
@pytest.mark.parametrize("ffn_size", [104, 128])  # the activation is part of the product for multiples of 64
def test_a_step_in_one_call_gives_the_logits_of_its_layers_one_by_one(
    kind: str, weights: str, ffn_size: int, load: Callable[..., Any]
) -> None:
    front = load(kind, ffn_size, weight_dtype=weights)
    native = front.rank.model.forward
    assert isinstance(native, NativeForward)
    at_once = all_logits(front)
    front.rank.model.forward = native.plain
    one_by_one = all_logits(front)
    assert len(at_once) == 6
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("target", ["avx512", "amx"])
def test_other_layers_than_llamas_have_their_steps_in_one_call_as_well(
    target: str, kind: str, weights: str, load: Callable[..., Any]
) -> None:
    if target.upper() not in usable_targets():
        pytest.skip(f"this machine has no {target}")
    front = load(kind, weight_dtype=weights, instruction_set=target)
    native = front.rank.model.forward
    assert isinstance(native, NativeForward)
    at_once = all_logits(front)
    front.rank.model.forward = native.plain
    one_by_one = all_logits(front)
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


@pytest.mark.parametrize("kind", OTHERS)
def test_decodes_of_other_layers_by_the_short_way_have_the_same_tokens(kind: str, load: Callable[..., Any]) -> None:
    outputs = []
    for is_short in (True, False):
        front = load(kind)
        if not is_short:
            front.rank._plain_decodes = None
        else:
            front.rank._plain_decodes = front.short_way
            assert front.short_way is not None
        new = [front.new("p", list(range(10, 30)))]
        front.step([front.first("p", 20, room=60, samples=True)], new)
        outputs.append([front.step([Chunk("p", 20 + i, 1, True)]).tokens for i in range(12)])
    assert outputs[0] == outputs[1]


def test_int8_weights_change_logits_a_little_and_are_told_of(load: Callable[..., Any]) -> None:
    plain, rounded = load("Llama"), load("Llama", weight_dtype="int8")
    assert rounded.ready.device.endswith("int8 weights")
    for before, after in zip(all_logits(plain), all_logits(rounded), strict=True):
        error = (after.float() - before.float()).norm() / before.float().norm()
        assert 0.0 < error < 0.1  # weights of deviation 0.2 through three layers; 0.063 seen


def test_int4_weights_give_the_bits_of_a_bf16_model_with_the_rounded_weights(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = load("Llama", weight_dtype="int4")
    assert rounded.ready.device.endswith("int4 weights")

    def bf16_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> NativeLinear:
        weight_IO = int4_linear(weight_OI, None)(torch.eye(weight_OI.shape[1]).bfloat16())
        return NativeLinear(weight_IO.T.contiguous(), bias_O)

    monkeypatch.setattr(packed_linear, "int4_linear", bf16_linear)
    plain = load("Llama", weight_dtype="int4")
    for one, other in zip(all_logits(rounded), all_logits(plain), strict=True):
        assert torch.equal(one, other)


def test_threads_and_a_layer_at_a_time_change_no_bit(load: Callable[..., Any]) -> None:
    front = load("Llama", 192, num_threads=3)
    with_threads = all_logits(front)
    num_calls = 0

    def before_layer() -> None:
        nonlocal num_calls
        num_calls += 1

    tensors_of = front.rank._tensors

    def with_calls(*args: Any) -> Any:
        tensors = tensors_of(*args)
        tensors.batch.before_layer = before_layer
        return tensors

    front.rank._tensors = with_calls
    by_layer = all_logits(front)
    assert num_calls == 6 * 3
    torch.set_num_threads(1)
    alone = all_logits(front)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(with_threads, by_layer, alone, strict=True))


def test_prompt_logprobs_come_from_the_same_hidden_states(load: Callable[..., Any]) -> None:
    front = load("Qwen2")
    new = [front.new("p", list(range(10, 30)), num_prompt_logprobs=1)]
    at_once = front.step([front.first("p", 20, room=40, samples=True)], new)
    front.rank.model.forward = front.rank.model.forward.plain
    one_by_one = front.step([front.first("p", 20, room=40, samples=True)], new)
    assert at_once.prompt_logprobs == one_by_one.prompt_logprobs != ()


@pytest.mark.parametrize("target", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_runs_whole_steps_and_computes_nearly_the_same(
    target: str, load: Callable[..., Any]
) -> None:
    if target.upper() not in usable_targets():
        pytest.skip(f"this machine has no {target}")
    front = load("Qwen3", instruction_set=target)
    assert native_target() == target.upper() and isinstance(front.rank.model.forward, NativeForward)
    native = all_logits(front)[0].float()  # of prompts: later ones depend on tokens sampled before
    onednn = all_logits(load("Qwen3", linear_backend="onednn"))[0].float()
    assert (native - onednn).norm() / onednn.norm() < 0.05  # roundings to bf16 in other places; 0.010 seen


def test_with_onednns_linear_layers_a_model_keeps_its_own_forward(load: Callable[..., Any]) -> None:
    assert "forward" not in vars(load("Llama", linear_backend="onednn").rank.model)


def test_an_instruction_set_that_the_machine_lacks_is_refused(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "usable_targets", lambda: ("AVX2",))
    with pytest.raises(ConfigError, match="model.instruction_set=amx: .*this machine has AVX2, not AMX; use auto"):
        load("Llama", instruction_set="amx")


def test_a_model_in_fp32_keeps_its_own_forward(front: Any) -> None:
    assert "forward" not in vars(front.rank.model)
