"""Where requests wait until the ranks have compiled their grammars: a step must not, since all others wait for it.

A rank compiles beside its steps (worker/main.py) and remembers what it compiled last. The API server asks for every
request, so it need not track what a rank has forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from megatron_medha.cluster.messages import GrammarPrepared, PrepareGrammar
from megatron_medha.core.batch import Aborted, Arrived, Event


class _HeldArrival(NamedTuple):
    arrived: Arrived
    question: PrepareGrammar
    missing: set[int]  # ranks that have not answered yet


class PendingGrammars:
    """Holds arrivals back. It sends nothing: questions to the ranks are handed out."""

    def __init__(self, ranks: Iterable[int], grammar_of: Callable[[str], str | None]) -> None:
        """ranks: that sample. grammar_of: a request's, by its id."""
        self.ranks = frozenset(ranks)
        self._grammar_of = grammar_of
        self._held: dict[int, _HeldArrival] = {}  # by number, in the order they came
        self._number_of: dict[str, int] = {}      # by request id
        self._unsent_numbers: list[int] = []
        self._next_number = 0

    def admit(self, event: Event | None) -> Sequence[Event | None]:
        """What may go on now that this has come: the event, or nothing yet."""
        match event:
            case Arrived(request):
                grammar = self._grammar_of(request.request_id)
                if grammar is not None:
                    self._hold(event, grammar)
                    return ()
            case Aborted(request_id) if request_id in self._number_of:
                self._release(self._number_of[request_id])
            case _:
                pass
        return (event,)

    def take_prepare_messages(self) -> Sequence[PrepareGrammar]:
        """What all ranks are to be asked; each once, until they are others."""
        unasked, self._unsent_numbers = self._unsent_numbers, []
        return [self._held[number].question for number in unasked if number in self._held]

    def take(self, message: GrammarPrepared) -> Sequence[Event]:
        """A rank has answered; what may go on."""
        held = self._held.get(message.number)
        if held is None:
            return ()  # its client has disconnected
        held.missing.discard(message.rank)
        return () if held.missing else (self._release(message.number),)

    def restart(self) -> None:
        """The ranks are others, which know of nothing yet."""
        self._unsent_numbers = list(self._held)
        for held in self._held.values():
            held.missing.update(self.ranks)

    def _hold(self, arrived: Arrived, grammar: str) -> None:
        number = self._next_number
        self._next_number += 1
        self._held[number] = _HeldArrival(arrived, PrepareGrammar(number, grammar), set(self.ranks))
        self._number_of[arrived.request.request_id] = number
        self._unsent_numbers.append(number)

    def _release(self, number: int) -> Arrived:
        arrived = self._held.pop(number).arrived
        del self._number_of[arrived.request.request_id]
        return arrived
