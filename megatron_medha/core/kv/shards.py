"""How a sequence is cut over KVP ranks: by position, into shards of equal length, the first of its ranks first.

Shard i holds tokens [i * shard_tokens, (i + 1) * shard_tokens). A chunk lies in one shard as a whole; the ranks of the
shards before it read what they hold. Scheduler, ranks and simulated worlds all count with these functions.
"""

from __future__ import annotations

from math import lcm

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import KVConfig


def num_shards(num_tokens: int, shard_tokens: int) -> int:
    """Number of shards of `num_tokens` tokens."""
    return -(-num_tokens // shard_tokens)


def split(num_tokens: int, shard_tokens: int) -> list[int]:
    """Number of tokens in each shard."""
    return [min(shard_tokens, num_tokens - start) for start in range(0, num_tokens, shard_tokens)]


def context_in(shard: int, start: int, shard_tokens: int) -> int:
    """Number of tokens before `start` that lie in this shard, which must not begin after `start`."""
    return min(start - shard * shard_tokens, shard_tokens)


def tokens_left(start: int, shard_tokens: int) -> int:
    """From `start` to the end of its shard, which no chunk may cross."""
    return shard_tokens - start % shard_tokens


def check_shard_tokens(shard_tokens: int | None, kv: KVConfig, block_size: int, name: str = "the block size") -> None:
    """Raises ConfigError unless shards of that length are made of whole blocks and, if hits are possible, granules."""
    unit = kv.shard_unit(block_size)
    if shard_tokens is None or not shard_tokens % unit:
        return
    whole = f"{name}={block_size}" if unit == block_size else f"the prefix cache's granule of {unit} tokens"
    ways = "" if unit == block_size else f"; use {-(-shard_tokens // unit) * unit}, or kv.prefix_cache=false"
    raise ConfigError(f"parallel.max_tokens_per_shard={shard_tokens} must be a multiple of {whole}{ways}")


def default_shard_tokens(
    num_blocks: int, block_size: int, max_context_len: int | None, kvp: int, kv: KVConfig
) -> int:
    """Default length of a shard: the longest context divided evenly over kvp ranks, in whole granules and partitions.

    The longest request then reads the same amount of KV on every rank, and requests shorter than a shard stay on one.
    Limited by the memory of a rank; a context of None by that alone. Where that holds no partition, shards are of whole
    blocks and granules. Raises ConfigError if it holds no granule.
    """
    memory_tokens = num_blocks * block_size
    # On one rank there is one shard, and nothing can cross its end.
    unit = kv.shard_unit(block_size) if kvp > 1 else block_size
    if kvp > 1 and (whole := lcm(unit, kv.partition_tokens)) <= memory_tokens:
        unit = whole
    if not (most := memory_tokens // unit * unit):
        raise ConfigError(
            f"model.kv_memory_gib: the KV memory holds {memory_tokens} tokens, less than the prefix cache's granule of "
            f"{unit}; raise it, or use kv.prefix_cache=false"
        )
    if max_context_len is None:
        return most
    return min(most, -(-max_context_len // (kvp * unit)) * unit)
