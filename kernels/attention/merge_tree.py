"""Nodes of the tree in which attention over partitions of keys is merged: which of them a shard is made of.

Partition p holds the keys at [p, p + 1) * partition_tokens of a sequence, wherever they lie. A node is 2^k neighbouring
partitions from a multiple of 2^k on. Results are merged node by node, so the order does not depend on who has computed
what: native/merge_tree.h.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def shard_nodes(first_token: int, end_token: int, num_seen: int, partition_tokens: int) -> np.ndarray:
    """First partitions, int64, of the largest nodes that make up a shard's tokens [first_token, end_token).

    Only those that begin before `num_seen` tokens of the sequence, and the first one in any case: the others are empty
    for everybody. Shards that do not begin and end with a partition have their first or last one in common with others.
    """
    first, end = first_token // partition_tokens, -(-end_token // partition_tokens)
    return _nodes(first, end, -(-num_seen // partition_tokens))


@lru_cache(maxsize=4096)
def _nodes(first: int, end: int, num_partitions: int) -> np.ndarray:
    found = [first]
    while (first := _end_of_node(first, end)) < min(end, num_partitions):
        found.append(first)
    return np.array(found, dtype=np.int64)


def _end_of_node(first: int, end: int) -> int:
    """Where the largest node ends that begins with a partition and does not go beyond another."""
    size = 1
    while first % (2 * size) == 0 and first + 2 * size <= end:
        size *= 2
    return first + size
