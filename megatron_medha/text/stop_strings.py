"""Finding stop strings in text that arrives in pieces, and holding back what may become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """What may be sent on, and the stop string that was found."""

    text: str
    stop: str | None


class StopMatcher:
    """Searches several stop strings at once; how the text is cut into pieces changes nothing.

    The first one to be complete wins; of two complete at the same character, the longer one.
    Knuth-Morris-Pratt, so that a character costs constant time whatever the strings are: they
    come from clients, and a search that re-reads its buffer could be made to cost milliseconds a token.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._num_matched = [0] * len(self._stops)
        self._is_included = is_included
        self._held = ""

    def push(self, text: str, *, is_armed: bool = True) -> StopResult:
        """Take the next piece. While not armed (before min_tokens) a complete stop string is only text."""
        buffer = self._held + text
        num_held = len(self._held)
        for offset, char in enumerate(text):
            found: str | None = None
            for index, stop in enumerate(self._stops):
                if self._advance(index, stop, char) and found is None:
                    found = stop
            if found is not None and is_armed:
                end = num_held + offset + 1
                self._held = ""
                return StopResult(buffer[:end] if self._is_included else buffer[: end - len(found)], found)
        longest = max(self._num_matched, default=0)
        keep_from = len(buffer) - min(longest, len(buffer))
        self._held = buffer[keep_from:]
        return StopResult(buffer[:keep_from], None)

    def finish(self) -> str:
        """What was held back; no more text follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, stop: str, char: str) -> bool:
        # Moves one automaton by one character; true when its stop string is complete.
        matched = self._num_matched[index]
        fallbacks = self._fallbacks[index]
        while matched and stop[matched] != char:
            matched = fallbacks[matched - 1]
        if stop[matched] == char:
            matched += 1
        is_complete = matched == len(stop)
        self._num_matched[index] = fallbacks[matched - 1] if is_complete else matched
        return is_complete


def _fallbacks(pattern: str) -> list[int]:
    # For each prefix: the length of its longest proper prefix that is also its suffix.
    lengths = [0] * len(pattern)
    matched = 0
    for position in range(1, len(pattern)):
        while matched and pattern[position] != pattern[matched]:
            matched = lengths[matched - 1]
        if pattern[position] == pattern[matched]:
            matched += 1
        lengths[position] = matched
    return lengths
