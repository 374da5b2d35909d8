"""Logits and tokens of the paged, chunked, co-batched model against transformers' own forward, in fp32.

Models are random with initializer_range 0.2: the default 0.02 gives nearly flat logits, which prove little.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from megatron.core.models.gpt import GPTModel  # noqa: E402

from megatron_medha.checkpoints.detect import load_weights, read_model_config  # noqa: E402
from megatron_medha.core.layout import ParallelLayout  # noqa: E402
from megatron_medha.model.build import build_model  # noqa: E402
from megatron_medha.model.packed_linear import pack_linears  # noqa: E402
from megatron_medha.models.model_config import ModelConfig  # noqa: E402
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed  # noqa: E402
from tests.model.paged_run import PagedRun, Prompt  # noqa: E402

CPU = torch.device("cpu")
# The promise, relative to the largest logit. transformers' own eager and sdpa differ by 4e-6.
RELATIVE_TOLERANCE = 1e-4

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-scaled": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 4, "head_dim": 48, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
}


@dataclass
class Pair:
    """The same weights in transformers and in ours."""

    theirs: Any
    ours: GPTModel    # as it is trained
    served: GPTModel  # as a rank runs it: packed weights
    config: ModelConfig
    directory: Path

    def reference(self, token_ids: Tensor) -> Tensor:
        """transformers' logits [T, V] of a prompt."""
        with torch.inference_mode():
            return self.theirs(token_ids[None]).logits[0]


def make_theirs(family: str, directory: Path) -> Any:
    """A random model of the family, saved to the directory."""
    name, options = FAMILIES[family]
    options = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **options,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)  # made as zeros, which would hide a bias that is not applied
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)  # made as ones
    theirs.save_pretrained(directory)
    return theirs


@pytest.fixture(scope="module")
def pgs() -> MedhaPGs:
    init_distributed(ParallelLayout(), 0, device=CPU)
    return build_groups(ParallelLayout())


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, pgs: MedhaPGs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_theirs(request.param, directory)
    config = read_model_config(directory)
    ours, served = (loaded(config, directory, pgs, torch.float32) for _ in range(2))
    pack_linears(served)
    yield Pair(theirs, ours, served, config, directory)


def loaded(config: ModelConfig, directory: Path, pgs: MedhaPGs, dtype: torch.dtype) -> GPTModel:
    model = build_model(config, dtype=dtype, device=CPU, pgs=pgs, is_initialized=False)
    load_weights(model, config, directory, lambda what, fraction: None)
    return model


def random_ids(pair: Pair, num_tokens: int, seed: int) -> Tensor:
    return torch.randint(4, pair.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def assert_exact(pair: Pair, prompt: Prompt) -> None:
    reference_TV = pair.reference(prompt.token_ids[: prompt.num_computed])
    error = (torch.cat(prompt.logits) - reference_TV).abs().max() / reference_TV.abs().max()
    assert error.item() < RELATIVE_TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 17, 100, 257])
def test_a_prompt_in_one_chunk_has_transformers_logits(pair: Pair, num_tokens: int) -> None:
    run = PagedRun(pair.served, pair.config, block_size=16)
    prompt = run.add(random_ids(pair, num_tokens, num_tokens))
    run.step([(prompt, num_tokens)])
    assert_exact(pair, prompt)


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_sizes", [(1,), (7,), (32, 1, 100), (256, 3)])
def test_any_chunk_and_block_sizes_give_transformers_logits(
    pair: Pair, chunk_sizes: tuple[int, ...], block_size: int
) -> None:
    num_tokens = 60 if chunk_sizes == (1,) else 300
    run = PagedRun(pair.served, pair.config, block_size=block_size)
    prompt = run.add(random_ids(pair, num_tokens, 5), num_extents=3)
    turn = 0
    while prompt.num_computed < num_tokens:
        count = chunk_sizes[turn % len(chunk_sizes)]
        run.step([(prompt, min(count, num_tokens - prompt.num_computed))])
        turn += 1
    assert_exact(pair, prompt)


def test_a_thousand_tokens_in_random_chunks_have_transformers_logits(pair: Pair) -> None:
    random_ = random.Random(0)
    run = PagedRun(pair.served, pair.config, block_size=16)
    prompt = run.add(random_ids(pair, 1024, 6), num_extents=2)
    while prompt.num_computed < 1024:
        run.step([(prompt, min(random_.choice((1, 32, 200, 512)), 1024 - prompt.num_computed))])
    assert_exact(pair, prompt)


def test_four_thousand_tokens_have_transformers_logits(pair: Pair) -> None:
    run = PagedRun(pair.served, pair.config, block_size=16)
    prompt = run.add(random_ids(pair, 4096, 11))
    for _ in range(4):
        run.step([(prompt, 1024)])
    assert_exact(pair, prompt)


def test_continued_prefills_decodes_and_new_prompts_share_a_batch_exactly(pair: Pair) -> None:
    run = PagedRun(pair.served, pair.config, block_size=16)
    continued = run.add(random_ids(pair, 200, 1))
    decoding = run.add(random_ids(pair, 40, 2), num_extents=3)
    other = run.add(random_ids(pair, 90, 3))
    run.step([(continued, 50), (decoding, 36)])
    run.step([(continued, 70), (decoding, 1), (other, 60)])
    run.step([(decoding, 1), (other, 1), (continued, 80)])
    run.step([(decoding, 1), (other, 1)])
    fresh = run.add(random_ids(pair, 33, 4))
    run.step([(fresh, 33), (other, 1), (decoding, 1)])
    for prompt in (continued, decoding, other, fresh):
        assert_exact(pair, prompt)


def test_a_prefill_preempted_ten_times_is_bit_equal_to_one_that_was_not(pair: Pair) -> None:
    token_ids = random_ids(pair, 330, 7)
    outcomes = []
    for is_preempted in (False, True):
        run = PagedRun(pair.served, pair.config, block_size=16)
        prompt = run.add(token_ids)
        for turn in range(11):
            run.step([(prompt, 30)])
            if is_preempted and turn < 10:
                intruder = run.add(random_ids(pair, 20 + turn, 100 + turn))
                run.step([(intruder, 10 + turn)])
                run.step([(intruder, 10)])
        outcomes.append(torch.cat(prompt.logits))
    assert torch.equal(*outcomes)


def test_the_training_forward_is_the_same_model(pair: Pair) -> None:
    token_ids = random_ids(pair, 128, 8)
    with torch.no_grad():
        logits_TV = pair.ours(token_ids[None], None, None)[0]
    reference_TV = pair.reference(token_ids)
    assert ((logits_TV - reference_TV).abs().max() / reference_TV.abs().max()).item() < RELATIVE_TOLERANCE


def test_the_training_forward_has_gradients_for_every_weight(pair: Pair) -> None:
    token_ids = torch.stack([random_ids(pair, 33, 9), random_ids(pair, 33, 10)])
    pair.ours.train()
    try:
        logits_BTV = pair.ours(token_ids[:, :-1], None, None)
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), token_ids[:, 1:].flatten()).backward()
        for name, parameter in pair.ours.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    finally:
        pair.ours.zero_grad(set_to_none=True)
        pair.ours.eval()


def test_bfloat16_is_no_further_from_fp32_than_transformers_own(pair: Pair, pgs: MedhaPGs) -> None:
    model = loaded(pair.config, pair.directory, pgs, torch.bfloat16)
    pack_linears(model)
    token_ids = random_ids(pair, 256, 12)
    run = PagedRun(model, pair.config, block_size=16)
    prompt = run.add(token_ids, num_extents=2)
    for count in (100, 100, 56):
        run.step([(prompt, count)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(pair.directory, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        theirs_TV = theirs(token_ids[None]).logits[0]
    reference_TV = pair.reference(token_ids)
    our_error, their_error = (
        (logits_TV.float() - reference_TV).abs().mean().item() for logits_TV in (torch.cat(prompt.logits), theirs_TV)
    )
    assert our_error < 1.25 * their_error
