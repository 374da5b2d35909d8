"""How a sequence is cut over KVP ranks: by position, into shards of equal length, the first of its ranks first.

Shard i holds tokens [i * shard_tokens, (i + 1) * shard_tokens). A chunk lies in one shard as a whole; the ranks of the
shards before it read what they hold. Scheduler, ranks and simulated worlds all count with these functions.
"""

from __future__ import annotations

from megatron_medha.core.kv.block_pool import num_blocks_for


def num_shards(num_tokens: int, shard_tokens: int) -> int:
    """Number of shards of `num_tokens` tokens."""
    return -(-num_tokens // shard_tokens)


def split(num_tokens: int, shard_tokens: int) -> list[int]:
    """Number of tokens in each shard."""
    return [min(shard_tokens, num_tokens - start) for start in range(0, num_tokens, shard_tokens)]


def context_in(shard: int, start: int, shard_tokens: int) -> int:
    """Number of tokens before `start` that lie in this shard, which must not begin after `start`."""
    return min(start - shard * shard_tokens, shard_tokens)


def begins_shard(start: int, shard_tokens: int) -> bool:
    """Whether a chunk at `start` is the first of its shard; it then carries the shard's blocks."""
    return start % shard_tokens == 0


def tokens_left(start: int, shard_tokens: int) -> int:
    """From `start` to the end of its shard, which no chunk may cross."""
    return shard_tokens - start % shard_tokens


def default_shard_tokens(num_blocks: int, block_size: int, max_context_len: int, kvp: int) -> int:
    """Default length of a shard: the longest context divided evenly over kvp ranks, in whole blocks.

    The longest request then reads the same amount of KV on every rank, and requests shorter than a shard stay on one.
    Limited by the memory of a rank.
    """
    part_tokens = -(-max_context_len // kvp)
    return min(num_blocks, num_blocks_for(part_tokens, block_size)) * block_size
