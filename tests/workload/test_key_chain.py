"""Prefix keys of texts that are only described: equal exactly where the texts are."""

from __future__ import annotations

from itertools import accumulate
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.kv.prefix_keys import KEY_BYTES
from megatron_medha.workload.key_chain import KeyChain, TextSpan, cut, num_tokens_of, spans_of_ids

SPANS = st.lists(st.builds(TextSpan, st.sampled_from("ab"), st.integers(0, 9), st.integers(1, 40)), max_size=8)


def tokens_of(spans: list[TextSpan]) -> list[tuple[str, int]]:
    return [(text, first + index) for text, first, count in spans for index in range(count)]


def keys_of(spans: list[TextSpan], granule_tokens: int) -> list[bytes]:
    chain = KeyChain(granule_tokens)
    chain.extend(spans)
    assert chain.num_tokens == num_tokens_of(spans)
    return [chain.keys[place : place + KEY_BYTES] for place in range(0, len(chain.keys), KEY_BYTES)]


@settings(max_examples=300, deadline=None)
@given(SPANS, SPANS, st.integers(1, 12))
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(
    one: list[TextSpan], other: list[TextSpan], granule_tokens: int
) -> None:
    keys = [keys_of(one, granule_tokens), keys_of(other, granule_tokens)]
    tokens = [tokens_of(one), tokens_of(other)]
    assert [len(found) for found in keys] == [len(found) // granule_tokens for found in tokens]
    for index, pair in enumerate(zip(*keys, strict=False)):
        end = (index + 1) * granule_tokens
        assert (pair[0] == pair[1]) == (tokens[0][:end] == tokens[1][:end])


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(1, 12), st.integers(0, 1 << 30))
def test_where_spans_are_cut_changes_no_key(spans: list[TextSpan], granule_tokens: int, seed: int) -> None:
    draw = Random(seed)
    pieces = []
    for text, first, count in spans:
        cuts = sorted({0, count, *(draw.randint(0, count) for _ in range(3))})
        pieces += [TextSpan(text, first + low, high - low) for low, high in zip(cuts, cuts[1:], strict=False)]
    assert keys_of(pieces, granule_tokens) == keys_of(spans, granule_tokens)


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(1, 12))
def test_append_gives_the_keys_that_it_adds(spans: list[TextSpan], granule_tokens: int) -> None:
    chain = KeyChain(granule_tokens)
    assert b"".join([chain.append(span) for span in spans]) == chain.keys


def test_a_chain_goes_on_after_keys_that_came_without_their_text() -> None:
    whole = KeyChain(4)
    whole.append(TextSpan("p", 0, 10))
    first, second = (KeyChain.after(whole.keys, 10, 4, name) for name in ("r1", "r2"))
    again = KeyChain.after(whole.keys, 10, 4, "r1")
    keys = [chain.append(TextSpan(name, 0, 6)) for chain, name in ((first, "r1"), (second, "r2"), (again, "r1"))]
    assert keys[0] == keys[2] != keys[1] and len(keys[0]) == 2 * KEY_BYTES


def test_a_block_of_512_tokens_is_several_granules_and_the_last_may_be_partial() -> None:
    assert len(keys_of(spans_of_ids([7, 8, 9], 1100, 512), 64)) == 1100 // 64
    assert len(keys_of(spans_of_ids([7, 8, 9], 1100, 512), 96)) == 1100 // 96  # granules across the ends of blocks
    shared = keys_of(spans_of_ids([7, 8, 5], 1300, 512), 64)
    assert shared[:16] == keys_of(spans_of_ids([7, 8, 9], 1100, 512), 64)[:16]


def test_a_cut_text_is_its_beginning() -> None:
    spans = [TextSpan("a", 3, 5), TextSpan("b", 0, 2)]
    for length, end in enumerate(accumulate([0, 1, 1, 1, 1, 1, 1, 1, 0, 0])):
        assert tokens_of(cut(spans, length)) == tokens_of(spans)[:end]
