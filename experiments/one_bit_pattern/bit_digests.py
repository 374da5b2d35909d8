"""Digests of log-probabilities: of a position in 8 bytes, of a request in one SHA."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from experiments.one_bit_pattern.short_schedules import MAX_TOKENS, NUM_TOP
from megatron_medha.bits.lone_run import lone_run, sequences_of, told_positions
from megatron_medha.bits.play import Place, Play, Told
from megatron_medha.core.sampling import TokenLogprobs


class BitCount(NamedTuple):
    """Positions compared with lone runs, those that differ, and the first one."""

    num_positions: int
    num_other: int
    first: str


def digest_of(said: TokenLogprobs) -> bytes:
    """Of all that is said of a position; every bit counts."""
    numbers = [said.logprob, *(logprob for _, logprob in said.top)]
    integers = [said.token_id, said.rank, *(token_id for token_id, _ in said.top)]
    packed = struct.pack(f"<{len(numbers)}d{len(integers)}q", *numbers, *integers)
    return hashlib.blake2b(packed, digest_size=8).digest()


def sha_of(told: Told) -> str:
    """Of a request: its tokens and all its log-probabilities. The first 16 digits."""
    found = hashlib.sha256(struct.pack(f"<{len(told.prompt)}i", *told.prompt))
    for position, said in told_positions(told):
        found.update(struct.pack("<i", position) + digest_of(said))
    return found.hexdigest()[:16]


class LoneRuns:
    """Digests by position of sequences that are alone, whole, on one rank; each is run once."""

    def __init__(self, place: Place) -> None:
        """place: of one rank that stays loaded."""
        self._place = place
        self._known: dict[str, tuple[list[int], list[bytes]]] = {}  # by request: tokens, and digests from position 1

    def compare(self, play: Play) -> BitCount:
        """All that was said in a play with what is said alone."""
        sequences = sequences_of(play)
        missing = {name: tokens for name, tokens in sequences.items() if not self._has(name, tokens)}
        if missing:
            alone = lone_run(missing, self._place, play.case.kv, num_top=NUM_TOP, least_tokens=MAX_TOKENS)
            for name, tokens in missing.items():
                said = alone.told[name].prompt_logprobs
                self._known[name] = (tokens, [digest_of(said[p]) for p in range(1, len(tokens))])
        num_positions, num_other, first = 0, 0, ""
        for name in sequences:
            _, digests = self._known[name]
            for position, said in told_positions(play.told[name]):
                num_positions += 1
                if digest_of(said) != digests[position - 1]:
                    num_other += 1
                    first = first or f"{name}, token {position}"
        return BitCount(num_positions, num_other, first)

    def _has(self, name: str, tokens: Sequence[int]) -> bool:
        """Of an aborted request the beginning is enough."""
        known, _ = self._known.get(name, ([], []))
        return known[: len(tokens)] == tokens
