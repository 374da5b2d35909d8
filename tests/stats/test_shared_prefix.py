"""How much of a prompt came before, by keys."""

from __future__ import annotations

import random
from array import array

from megatron_medha.core.batch import Aborted, Arrived, Completed
from megatron_medha.core.kv.prefix_keys import GranuleKeys, root_key
from megatron_medha.core.request import Request
from megatron_medha.stats.shared_prefix import PrefixHistory, SharedPrefix

GRANULE = 2


def keys_of(*tokens: int) -> bytes:
    return GranuleKeys(root_key(b"secret"), GRANULE).extend(array("i", tokens))


def arrived(name: str, *tokens: int) -> Arrived:
    return Arrived(
        Request(
            request_id=name, num_prompt_tokens=len(tokens), max_output_tokens=1, arrival_s=0.0,
            prefix_keys=keys_of(*tokens),
        )
    )


def test_a_prompt_shares_the_longest_prefix_with_whoever_had_it_first() -> None:
    history = PrefixHistory(GRANULE)
    history.note(arrived("a", 1, 2, 3, 4))
    history.note(arrived("b", 1, 2, 3, 4, 5, 6, 7))
    history.note(Aborted("b"))
    assert history.shared(keys_of(1, 2, 3, 5)) == SharedPrefix(2, "a", GRANULE)
    assert history.shared(keys_of(1, 2, 3, 4, 5, 6, 7, 8)) == SharedPrefix(6, "b", GRANULE)
    assert history.shared(keys_of(9, 9)) == history.shared(b"") == SharedPrefix(0, "", GRANULE)


def test_what_an_output_has_filled_counts_too() -> None:
    history = PrefixHistory(GRANULE)
    history.note(arrived("a", 1, 2))
    history.note(Completed(0, 0.1, filled_keys=(("a", keys_of(1, 2, 3, 4)[16:]),)))
    assert history.shared(keys_of(1, 2, 3, 4, 5, 6)) == SharedPrefix(4, "a", GRANULE)


def test_it_is_what_a_comparison_with_every_earlier_prompt_finds() -> None:
    draw = random.Random(0)
    history, before = PrefixHistory(GRANULE), []
    for index in range(300):
        tokens = [*draw.choice([[], *before[-20:]]), *(draw.randrange(2) for _ in range(draw.randrange(6)))]
        shared = max((common(tokens, other) // GRANULE * GRANULE for other in before), default=0)
        assert history.shared(keys_of(*tokens)).num_tokens == shared
        history.note(arrived(str(index), *tokens))
        before.append(tokens)


def common(first: list[int], second: list[int]) -> int:
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
