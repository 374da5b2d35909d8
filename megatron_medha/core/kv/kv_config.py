"""Options of the KV memory: prefix cache, its granule, what is evicted first, what sessions may keep, partitions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medha.core.errors import ConfigError, check_member, check_range, check_ranges

EVICTIONS = ("value", "lru", "ttl")
_PARTITION_UNIT = 16  # tokens that the CPU kernels take at once
_MIN_GRANULE_TOKENS = 16  # half of it is computed again in each turn; shorter ones cost decisions more than they save


@dataclass(frozen=True, slots=True, kw_only=True)
class KVConfig:
    """Whether and how computed KV is kept for later requests."""

    prefix_cache: bool = True
    granule_tokens: int | None = None  # unit of hits; None: the smallest multiple of the block size from 16 tokens on
    eviction: str = "value"            # recompute seconds x chance of reuse / bytes; or the longest unused first
    session_ttl_s: float = 600.0       # from a session's last request; until then its KV is evicted after other KV
    session_share: float = 0.5         # of KV memory that sessions keep in that way
    partition_tokens: int = 1024       # keys that attention sums up at once; sums are merged in a fixed tree

    def __post_init__(self) -> None:
        check_member("kv.eviction", self.eviction, EVICTIONS)
        check_range("kv.granule_tokens", self.granule_tokens, 1, 1 << 20)
        check_range("kv.partition_tokens", self.partition_tokens, _PARTITION_UNIT, 1 << 20)
        if self.partition_tokens % _PARTITION_UNIT:
            raise ConfigError(f"kv.partition_tokens={self.partition_tokens} must be a multiple of {_PARTITION_UNIT}")
        check_ranges("kv", self, 0.0, 1e9, "session_ttl_s")
        check_ranges("kv", self, 0.0, 1.0, "session_share")

    def tokens_per_granule(self, block_size: int) -> int:
        """Tokens of a granule, where blocks are of that size. Raises ConfigError if kv.granule_tokens does not fit."""
        if self.granule_tokens is None:
            return -(-_MIN_GRANULE_TOKENS // block_size) * block_size
        if self.granule_tokens % block_size:
            raise ConfigError(
                f"kv.granule_tokens={self.granule_tokens} must be a multiple of the block size, {block_size} tokens"
            )
        return self.granule_tokens

    def shard_unit(self, block_size: int) -> int:
        """Tokens that a shard's length is a multiple of: no granule crosses the end of a shard."""
        return self.tokens_per_granule(block_size) if self.prefix_cache else block_size


NO_PREFIX_CACHE = KVConfig(prefix_cache=False)
