"""A sequence cut over KVP ranks by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.core.kv.shards import context_in, num_shards, split, tokens_left

TOKENS, SHARDS = st.integers(1, 500), st.integers(1, 40)


@given(TOKENS, SHARDS)
def test_shards_are_full_but_for_the_last(num_tokens: int, shard_tokens: int) -> None:
    parts = split(num_tokens, shard_tokens)
    assert sum(parts) == num_tokens and len(parts) == num_shards(num_tokens, shard_tokens)
    assert set(parts[:-1]) <= {shard_tokens} and 0 < parts[-1] <= shard_tokens


@given(TOKENS, SHARDS)
def test_the_context_before_a_chunk_lies_in_the_shards_up_to_its_own(start: int, shard_tokens: int) -> None:
    own = num_shards(start + 1, shard_tokens)
    assert sum(context_in(shard, start, shard_tokens) for shard in range(own)) == start


@pytest.mark.parametrize(("start", "left"), [(0, 8), (3, 5), (7, 1), (8, 8)])
def test_a_chunk_ends_with_its_shard(start: int, left: int) -> None:
    assert tokens_left(start, 8) == left
