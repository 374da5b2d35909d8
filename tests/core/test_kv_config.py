"""The options of the KV memory, its granule, and the lengths of shards that follow."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nextafter
from typing import Any

import pytest

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.kv.shards import check_shard_tokens, default_shard_tokens

ON = KVConfig()
BY_64 = KVConfig(granule_tokens=64)


@pytest.mark.parametrize(
    ("block_size", "granule_tokens"), [(1, 16), (4, 16), (16, 16), (12, 24), (15, 30), (24, 24), (128, 128)]
)
def test_a_granule_is_the_smallest_multiple_of_the_block_size_from_16_tokens_on(
    block_size: int, granule_tokens: int
) -> None:
    assert ON.tokens_per_granule(block_size) == granule_tokens


def test_a_granule_of_another_length_is_made_of_whole_blocks() -> None:
    assert KVConfig(granule_tokens=16).tokens_per_granule(16) == 16
    with pytest.raises(ConfigError) as error:
        KVConfig(granule_tokens=100).tokens_per_granule(16)
    assert str(error.value) == "kv.granule_tokens=100 must be a multiple of the block size, 16 tokens"


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [("granule_tokens", 1, 1 << 20), ("session_ttl_s", 0.0, 1e9), ("session_share", 0.0, 1.0)],
)
def test_an_option_may_have_both_its_bounds_and_nothing_beyond(key: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(replace(ON, **{key: value}), key) == value
    outside: tuple[Any, Any] = (low - 1, high + 1) if isinstance(low, int) else (
        nextafter(low, -inf), nextafter(high, inf)
    )
    for value in outside:
        with pytest.raises(ConfigError, match=rf"^kv\.{key}=.*: must be between "):
            replace(ON, **{key: value})


def test_an_unknown_eviction_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        KVConfig(eviction="random")
    assert str(error.value) == "kv.eviction=random: not known; use one of value, lru, ttl"


def test_no_granule_crosses_the_end_of_a_shard() -> None:
    check_shard_tokens(None, ON, 16)
    check_shard_tokens(128, BY_64, 16)
    check_shard_tokens(1008, NO_PREFIX_CACHE, 16)
    with pytest.raises(ConfigError) as error:
        check_shard_tokens(1008, BY_64, 16)
    assert str(error.value) == (
        "parallel.max_tokens_per_shard=1008 must be a multiple of the prefix cache's granule of 64 tokens; "
        "use 1024, or kv.prefix_cache=false"
    )


@pytest.mark.parametrize("partition_tokens", [0, 8, 100])
def test_a_partition_is_made_of_what_the_kernels_take_at_once(partition_tokens: int) -> None:
    with pytest.raises(ConfigError, match="kv.partition_tokens="):
        KVConfig(partition_tokens=partition_tokens)


def test_a_shard_is_an_even_part_of_the_longest_context_in_whole_granules_and_partitions() -> None:
    assert default_shard_tokens(1000, 16, 4096, 2, BY_64) == 2048
    assert default_shard_tokens(1000, 16, 4000, 3, BY_64) == 2048  # two partitions of 1,024 tokens
    by_96 = KVConfig(granule_tokens=96, partition_tokens=64)
    assert default_shard_tokens(1000, 16, 4000, 3, by_96) == 1344  # seven times 192, in which both fit
    assert default_shard_tokens(50, 16, 4096, 2, BY_64) == 768     # of the 800 tokens that there is memory for
    assert default_shard_tokens(50, 16, None, 2, BY_64) == 768
    assert default_shard_tokens(50, 16, None, 1, BY_64) == 800     # nothing follows it
    with pytest.raises(ConfigError) as error:
        default_shard_tokens(3, 16, 4096, 2, BY_64)
    assert str(error.value) == (
        "model.kv_memory_gib: the KV memory holds 48 tokens, less than the prefix cache's granule of 64; "
        "raise it, or use kv.prefix_cache=false"
    )
