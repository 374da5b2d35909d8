"""Tokens of sessions so far, for those who watch: up to which one a prompt is what its session had before."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

_MAX_TOKENS = 16_000_000  # of all sessions: 64 MB
_MAX_SEQUENCES = 4        # of one session, the latest: choices and subagents may go on from any


@dataclass(slots=True, eq=False)
class SessionSequence:
    """The tokens of one request; its output grows."""

    prompt_ids: array[int]
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    is_kept: bool = True

    def num_common(self, token_ids: array[int], at_least: int) -> int:
        """Tokens from the first on that are those of a prompt; 0 where they are not more than at_least."""
        num_prompt = len(self.prompt_ids)
        own = self.prompt_ids if at_least < num_prompt else self.output_ids
        place = at_least if at_least < num_prompt else at_least - num_prompt
        if at_least and (place >= len(own) or at_least >= len(token_ids) or own[place] != token_ids[at_least]):
            return 0
        count = _num_common(self.prompt_ids, token_ids)
        return count if count < num_prompt else count + _num_common(self.output_ids, token_ids[num_prompt:])


class SessionHistory:
    """The latest sequences of each session; the session that was idle longest is forgotten first."""

    def __init__(self, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._sessions: OrderedDict[str, list[SessionSequence]] = OrderedDict()

    def num_shared_tokens(self, session_id: str, token_ids: array[int]) -> int | None:
        """Of a prompt, those that one of its session's requests began with; None: nothing is known of the session."""
        if (sequences := self._sessions.get(session_id)) is None:
            return None
        most = 0
        for sequence in reversed(sequences):
            most = max(most, sequence.num_common(token_ids, most))
        return most

    def add(self, session_id: str, token_ids: array[int]) -> SessionSequence:
        """A request of the session has come. The ids are not to be changed."""
        added = SessionSequence(token_ids)
        sequences = self._sessions.setdefault(session_id, [])
        self._sessions.move_to_end(session_id)
        for before in tuple(sequences):
            # What goes on from its answer holds all of its prompt.
            if len(sequences) == _MAX_SEQUENCES or before.num_common(token_ids, 0) > len(before.prompt_ids):
                sequences.remove(before)
                self._drop(before)
        sequences.append(added)
        self._num_tokens += len(token_ids)
        while self._num_tokens > self._max_tokens:
            self.forget(next(iter(self._sessions)))
        return added

    def extend(self, sequence: SessionSequence, token_id: int) -> None:
        """A token was sampled."""
        if sequence.is_kept:
            sequence.output_ids.append(token_id)
            self._num_tokens += 1

    def forget(self, session_id: str) -> None:
        """Nothing of the session follows."""
        for sequence in self._sessions.pop(session_id, ()):
            self._drop(sequence)

    def _drop(self, sequence: SessionSequence) -> None:
        sequence.is_kept = False
        self._num_tokens -= len(sequence.prompt_ids) + len(sequence.output_ids)


def _num_common(first: array[int], second: array[int]) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
