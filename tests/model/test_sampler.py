"""The sampler against plain Python references, chi-square bounds and its own promises."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from megatron_medha.core.sampling import Sampling
from megatron_medha.model.draw import SamplingRow, _nucleus_cut, draw_uniform, nucleus_cut_of_unsorted
from megatron_medha.model.logprobs import prompt_logprobs, row_logsumexp
from megatron_medha.model.sampler import Sampler, is_plain_greedy

VOCAB_SIZE = 12


def row(
    seed: int = 0, draw: int | None = None, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **sampling
) -> SamplingRow:
    parameters = Sampling(max_output_tokens=100, **sampling)
    num_output_tokens = len(output) if draw is None else draw
    return SamplingRow(parameters, torch.tensor(prompt, dtype=torch.int64), output, seed, num_output_tokens)


def reference_distribution(logits: list[float], r: SamplingRow) -> list[float]:
    """The distribution one draw comes from, in plain Python doubles."""
    s = r.sampling
    logits = list(logits)
    for token_id, bias in s.logit_bias:
        logits[token_id] += bias
    if r.num_output_tokens < s.min_output_tokens:
        for token_id in s.stop_token_ids:
            if token_id < len(logits):
                logits[token_id] = -math.inf
    counts = Counter(r.output_ids)
    for token_id in set(r.prompt_ids.tolist()) | set(counts):
        x = logits[token_id]
        logits[token_id] = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
    for token_id, count in counts.items():
        logits[token_id] -= s.frequency_penalty * count + s.presence_penalty
    best = max(logits)
    weights = [math.exp((x - best) / s.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[: s.top_k] if s.top_k else order
    total = sum(weights[i] for i in kept)
    before, nucleus = 0.0, []
    for i in kept:
        if before < s.top_p * total or not nucleus:
            nucleus.append(i)
        before += weights[i]
    kept = [i for i in nucleus if weights[i] >= s.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("allowed", [None, {0: torch.arange(VOCAB_SIZE) < 3}])
@pytest.mark.parametrize("penalty", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-38, 1.0, 1e30, 3.5e38, 1.7e308])
def test_the_most_extreme_parameters_leave_a_token_that_is_allowed(
    temperature: float, penalty: float, allowed: dict[int, torch.Tensor] | None
) -> None:
    extreme = row(
        prompt=(1, 2), output=(2, 3), temperature=temperature, repetition_penalty=penalty, top_p=5e-324, min_p=1e-320,
        presence_penalty=2.0, frequency_penalty=-2.0, logit_bias=((1, 100.0), (2, -100.0)),
    )  # fmt: skip
    logits = some_logits(3) * 1000
    for one in (extreme, row(prompt=(1,), temperature=temperature, repetition_penalty=penalty)):
        (sampled,) = Sampler(VOCAB_SIZE, "cpu").sample(logits, [one], allowed)
        assert sampled is not None
        assert allowed is None or sampled.token_id < 3


def some_logits(seed: int, num_rows: int = 1, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


DISTRIBUTIONS = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all filters": {"top_k": 8, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "bias": {"logit_bias": ((3, 2.0), (5, -4.0), (3, 0.5))},
    "penalties": {"prompt": (1, 2, 2, 7), "output": (2, 5, 5, 5), "repetition_penalty": 1.7,
                  "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "short output": {"min_output_tokens": 10**9, "stop_token_ids": (0, 4, 999)},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_reference_distribution(name: str):
    logits = some_logits(7)
    num_draws = 6000
    rows = [row(seed=11, draw=draw, **DISTRIBUTIONS[name]) for draw in range(num_draws)]
    expected = reference_distribution(logits[0].tolist(), rows[1])
    drawn = Counter(s.token_id for s in Sampler(VOCAB_SIZE, "cpu").sample(logits.expand(num_draws, -1), rows))
    assert all(expected[token_id] > 0 for token_id in drawn)
    cells = [i for i in range(VOCAB_SIZE) if expected[i] * num_draws >= 5]
    chi_square = sum((drawn[i] - expected[i] * num_draws) ** 2 / (expected[i] * num_draws) for i in cells)
    degrees = max(len(cells) - 1, 1)
    # Five standard deviations above the mean of the chi-square distribution; the seed is fixed.
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_every_filter_combination_keeps_exactly_the_reference_support():
    generator = random.Random(3)
    for trial in range(60):
        settings = {
            "top_k": generator.choice([0, 1, 3, 6, 50]),
            "top_p": generator.choice([1.0, 0.9, 0.5, 0.01]),
            "min_p": generator.choice([0.0, 0.1, 0.5]),
            "temperature": generator.choice([0.5, 1.0, 2.0]),
        }
        logits = some_logits(100 + trial)
        expected = reference_distribution(logits[0].tolist(), row(**settings))
        rows = [row(seed=trial, draw=draw, **settings) for draw in range(300)]
        drawn = {s.token_id for s in Sampler(VOCAB_SIZE, "cpu").sample(logits.expand(300, -1), rows)}
        likely = {i for i, p in enumerate(expected) if p > 0.1}
        assert likely <= drawn <= {i for i, p in enumerate(expected) if p > 0}, settings


@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_a_nucleus_of_a_large_vocabulary_is_the_reference_nucleus(spread: float):
    vocab_size = 5000  # with spread 0.1 the nucleus is wider than the sampler's first guess
    logits = some_logits(3, vocab_size=vocab_size) * spread
    rows = [row(seed=1, draw=draw, top_p=0.6) for draw in range(400)]
    expected = reference_distribution(logits[0].tolist(), rows[0])
    drawn = [s.token_id for s in Sampler(vocab_size, "cpu").sample(logits.expand(400, -1), rows)]
    assert all(expected[token_id] > 0 for token_id in drawn)
    best_half = sorted(range(vocab_size), key=lambda i: -expected[i])[: sum(p > 0 for p in expected) // 2]
    share = sum(expected[i] for i in best_half)
    assert sum(i in set(best_half) for i in drawn) / 400 == pytest.approx(share, abs=5 * math.sqrt(0.25 / 400))


def test_uniforms_are_uniform_over_draws_and_over_seeds():
    for numbers in ([draw_uniform(5, n) for n in range(20_000)], [draw_uniform(s, 0) for s in range(20_000)]):
        cells = Counter(int(u * 100) for u in numbers)
        chi_square = sum((cells[i] - 200) ** 2 / 200 for i in range(100))
        assert chi_square < 99 + 5 * math.sqrt(2 * 99)
        assert all(0.0 <= u < 1.0 for u in numbers)


def test_any_integer_is_a_seed():
    assert len({draw_uniform(seed, 0) for seed in (0, -1, 2**63, 2**64 + 1, -(2**70) + 7)}) == 5


def test_a_draw_does_not_depend_on_the_batch_around_it():
    vocab_size = 1000
    logits = some_logits(1, num_rows=9, vocab_size=vocab_size)
    rows = [
        row(seed=1, draw=3),
        row(seed=2, draw=3, top_k=40),
        row(seed=3, draw=1, top_p=0.8),
        row(seed=4, draw=9, min_p=0.02, temperature=1.7),
        row(temperature=0.0),
        row(seed=5, draw=2, top_k=5, top_p=0.5, num_logprobs=3),
        row(seed=6, output=(1, 2, 3), repetition_penalty=1.3, num_logprobs=0),
        row(seed=7, logit_bias=((4, 5.0),)),
        row(seed=8, min_output_tokens=5, stop_token_ids=(9,)),
    ]
    sampler = Sampler(vocab_size, "cpu")
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    reversed_order = sampler.sample(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == reversed_order


def test_greedy_takes_the_best_token_whatever_the_filters():
    logits = some_logits(2, num_rows=3)
    rows = [row(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, seed=seed) for seed in range(3)]
    assert [s.token_id for s in Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)] == logits.argmax(-1).tolist()


def test_greedy_heeds_bias_penalties_and_the_shortest_output():
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 4] = 3.0
    rows = [
        row(temperature=0.0, logit_bias=((6, 10.0),)),
        row(temperature=0.0, output=(4, 4), frequency_penalty=2.0),
        row(temperature=0.0, min_output_tokens=1, stop_token_ids=(4,)),
    ]
    first, second, third = Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)
    assert first.token_id == 6 and second.token_id != 4 and third.token_id != 4


def test_stop_tokens_are_free_again_after_the_shortest_output():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[:, 4] = 30.0
    late = row(temperature=0.0, output=(1,), min_output_tokens=1, stop_token_ids=(4,))
    assert Sampler(VOCAB_SIZE, "cpu").sample(logits, [late])[0].token_id == 4


def test_a_temperature_close_to_zero_is_greedy_and_finite():
    logits = some_logits(8, num_rows=2) * 100
    rows = [row(temperature=temperature, seed=3) for temperature in (1e-60, 1e-9)]
    assert [s.token_id for s in Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(poison: float):
    logits = some_logits(4, num_rows=4)
    rows = [row(seed=1), row(temperature=0.0, num_logprobs=2), row(seed=2, top_p=0.5), row(temperature=0.0)]
    sampler = Sampler(VOCAB_SIZE, "cpu")
    clean = sampler.sample(logits, rows)
    for bad in range(4):
        poisoned = logits.clone()
        poisoned[bad, 5] = poison
        sampled = sampler.sample(poisoned, rows)
        assert sampled[bad] is None
        assert [s for i, s in enumerate(sampled) if i != bad] == [s for i, s in enumerate(clean) if i != bad]


def test_a_row_without_any_finite_logit_is_reported():
    assert Sampler(VOCAB_SIZE, "cpu").sample(torch.full((1, VOCAB_SIZE), -math.inf), [row()]) == [None]


def test_padding_columns_are_never_sampled_nor_counted():
    logits = some_logits(6)
    padded = torch.cat((logits, torch.full((1, 4), 50.0)), dim=1)
    rows = [row(temperature=0.0, num_logprobs=3)]
    sampler = Sampler(VOCAB_SIZE, "cpu")
    assert sampler.sample(padded, rows) == sampler.sample(logits, rows)


def test_logprobs_are_of_the_raw_distribution():
    logits = some_logits(9)
    biased = row(seed=1, temperature=0.3, top_k=2, logit_bias=((1, 40.0),), num_logprobs=4)
    sampled = Sampler(VOCAB_SIZE, "cpu").sample(logits, [biased])[0]
    expected = logits[0].double().log_softmax(-1)
    assert sampled.token_id == 1
    assert sampled.logprobs.logprob == pytest.approx(expected[1].item(), abs=1e-5)
    assert sampled.logprobs.rank == int((expected > expected[1]).sum()) + 1
    assert [i for i, _ in sampled.logprobs.top] == expected.argsort(descending=True)[:4].tolist()
    best = expected.sort(descending=True).values[:4].tolist()
    assert [p for _, p in sampled.logprobs.top] == pytest.approx(best, abs=1e-5)


def test_a_rows_logprobs_have_the_same_bits_alone_and_beside_others_on_several_threads():
    logits = torch.randn(64, 50_304, generator=torch.Generator().manual_seed(0)) * 4
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = torch.cat([row_logsumexp(one) for one in logits.split(1)])
        together = row_logsumexp(logits)
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(alone, together) and torch.equal(together, row_logsumexp(logits))


def test_logprobs_come_only_to_those_who_ask_and_only_as_many():
    rows = [row(temperature=0.0), row(temperature=0.0, num_logprobs=0), row(temperature=0.0, num_logprobs=50)]
    none, own, all_of_them = Sampler(VOCAB_SIZE, "cpu").sample(some_logits(3, num_rows=3), rows)
    assert none.logprobs is None
    assert own.logprobs.top == ()
    assert len(all_of_them.logprobs.top) == VOCAB_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_has_bit_equal_logprobs_in_both_places(dtype: torch.dtype):
    logits = some_logits(5, num_rows=64, vocab_size=500).to(dtype)
    for sampled in Sampler(500, "cpu").sample(logits, [row(temperature=0.0, num_logprobs=5)] * 64):
        assert sampled.logprobs.top[0] == (sampled.token_id, sampled.logprobs.logprob)
        assert sampled.logprobs.rank == 1


def test_ties_are_listed_in_order_of_id():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    sampled = Sampler(VOCAB_SIZE, "cpu").sample(logits, [row(temperature=0.0, num_logprobs=5)])[0]
    assert sampled.token_id == 1
    assert [i for i, _ in sampled.logprobs.top] == [1, 3, 6, 2, 4]


def test_prompt_logprobs_are_the_log_softmax_of_the_next_tokens():
    logits = some_logits(12, num_rows=8)
    next_ids = torch.arange(8, dtype=torch.int32)
    found = prompt_logprobs(logits, next_ids, num_top=2)
    expected = logits.double().log_softmax(-1)
    assert [f.token_id for f in found] == list(range(8))
    assert [f.logprob for f in found] == pytest.approx([expected[i, i].item() for i in range(8)], abs=1e-5)
    assert [f.top[0][0] for f in found] == logits.argmax(-1).tolist()
    assert all(len(f.top) == 2 for f in found)


def test_the_logits_given_are_left_as_they_were():
    logits = some_logits(1, num_rows=2)
    before = logits.clone()
    penalised = row(output=(1,), presence_penalty=1.0, min_output_tokens=9, stop_token_ids=(2,))
    rows = [row(logit_bias=((1, 5.0),)), penalised]
    Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)
    assert torch.equal(logits, before)


def test_an_empty_batch_gives_nothing():
    assert Sampler(VOCAB_SIZE, "cpu").sample(torch.empty(0, VOCAB_SIZE), []) == []


def test_a_batch_that_takes_the_best_is_sampled_as_any_other() -> None:
    greedy = row(temperature=0.0)
    assert is_plain_greedy(greedy.sampling)
    # bf16 ties often; padding columns hold the largest of all.
    logits_RV = torch.randint(0, 4, (50, VOCAB_SIZE + 3)).bfloat16()
    logits_RV[:, VOCAB_SIZE:] = 9.0
    logits_RV[3, 5], logits_RV[4, 0], logits_RV[5] = torch.nan, torch.inf, -torch.inf
    sampler = Sampler(VOCAB_SIZE, "cpu")
    found = sampler.choose_greedy(logits_RV).rows()
    assert found == sampler.sample(logits_RV, [greedy] * 50)
    assert [index for index, chosen in enumerate(found) if chosen is None] == [3, 4, 5]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0},
        {"logit_bias": ((1, 2.0),)},
        {"min_output_tokens": 1, "stop_token_ids": (2,)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"num_logprobs": 0},
    ],
)
def test_whoever_asks_for_more_than_the_best_token_is_looked_at(asked: dict[str, object]) -> None:
    assert not is_plain_greedy(Sampling(**{"max_output_tokens": 5, "temperature": 0.0, **asked}))


def test_a_nucleus_is_found_without_a_sort():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.1, 1.0, 8.0):
        logits = torch.randn(6, 4000, generator=generator) * spread
        logits[1] = logits[1].bfloat16().float()  # ties
        logits[2, 50:] = -torch.inf
        logits -= logits.amax(dim=-1, keepdim=True)
        masses = logits.exp().sum(dim=-1, keepdim=True, dtype=torch.float64) * torch.linspace(0.1, 0.95, 6)[:, None]
        ordered = logits.sort(dim=-1, descending=True).values
        expected, _ = _nucleus_cut(ordered, masses)
        assert torch.equal(nucleus_cut_of_unsorted(logits, masses), expected), spread
