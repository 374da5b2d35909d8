"""Outputs with the prefix cache are those without it, on real ranks. The large version: experiments/exact_hits."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from experiments.exact_hits.compare import compare
from experiments.exact_hits.run import model_options
from megatron_medha.bits import play
from megatron_medha.bits.play import Place, Play
from megatron_medha.bits.random_schedule import random_case
from megatron_medha.bits.rank_processes import RankProcesses
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.layout import ParallelLayout
from tests.parallel.walk import VOCAB_SIZE, Reference

SEED = 3  # with preemptions, evictions, an abort, repeated prompts


def both(place: Place, *, is_greedy: bool = False) -> tuple[Play, Play]:
    """A case without and with the cache."""
    case = random_case(
        SEED, kvp=place.layout.kvp, vocab_size=VOCAB_SIZE, num_turns=16, is_greedy=is_greedy, num_output_tokens=40
    )
    return Play(case, place, has_cache=False).run(), Play(case, place, has_cache=True).run()


@pytest.mark.parametrize(("dtype", "spp"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_no_log_probability_differs_in_a_bit(
    dtype: str, spp: int, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    plain, cached = both(Place(ranks, model[0], ParallelLayout(spp=spp), model_options(dtype)))
    found = compare(plain, cached)
    assert found.num_tokens > 200 and not found.num_other_bits, found.first
    assert cached.counts["hits on decodes"] and cached.counts["hits of repeated prompts"]
    assert cached.counts["preempted"]


@pytest.mark.parametrize("layout", [ParallelLayout(kvp=2), ParallelLayout(tp=2)], ids=["kvp=2", "tp=2"])
def test_no_greedy_token_differs(
    layout: ParallelLayout, ranks: RankProcesses, model: tuple[Path, Reference]
) -> None:
    plain, cached = both(Place(ranks, model[0], layout, model_options("float32")), is_greedy=True)
    found = compare(plain, cached)
    assert found.num_tokens > 100 and not found.num_other_tokens, found.first
    assert cached.counts["hits"]


class _KeysOfLengths(GranuleKeys):
    """Keys that do not depend on the tokens: hits are wrong."""

    def extend(self, token_ids: array[int]) -> bytes:
        return super().extend(array("i", [0] * len(token_ids)))

    def append(self, token_id: int) -> bytes:
        return super().append(0)


def test_a_wrong_hit_shows_as_other_bits(
    ranks: RankProcesses, model: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play, "GranuleKeys", _KeysOfLengths)
    plain, cached = both(Place(ranks, model[0], ParallelLayout(), model_options("bfloat16")))
    assert compare(plain, cached).num_other_bits
