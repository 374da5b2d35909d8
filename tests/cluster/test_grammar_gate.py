"""Requests with a grammar wait until all ranks that sample have compiled it; nobody else does."""

from __future__ import annotations

import pytest

from megatron_medha.cluster.messages import GrammarPrepared
from megatron_medha.cluster.pending_grammars import PendingGrammars
from megatron_medha.core.batch import Aborted, Arrived
from megatron_medha.core.request import Request


def arrived(name: str) -> Arrived:
    return Arrived(Request(request_id=name, num_prompt_tokens=1, max_output_tokens=1, arrival_s=0.0))


@pytest.fixture
def gate() -> PendingGrammars:
    """Two ranks; a request's grammar is its name, those of one letter have none."""
    return PendingGrammars([1, 3], lambda name: name if len(name) > 1 else None)


def test_a_request_goes_on_once_the_last_rank_has_compiled_its_grammar(gate: PendingGrammars) -> None:
    assert gate.admit(arrived("digits")) == ()
    (question,) = gate.take_prepare_messages()
    assert question.grammar == "digits" and gate.take_prepare_messages() == []
    assert gate.take(GrammarPrepared(3, question.number)) == ()
    assert gate.take(GrammarPrepared(3, question.number)) == ()
    assert gate.take(GrammarPrepared(1, question.number)) == (arrived("digits"),)
    assert gate.take(GrammarPrepared(1, question.number)) == ()


def test_who_has_no_grammar_passes_those_that_wait(gate: PendingGrammars) -> None:
    gate.admit(arrived("digits"))
    for event in (arrived("a"), Aborted("a"), Aborted("unknown"), None):
        assert gate.admit(event) == (event,)


def test_one_whose_client_left_never_goes_on_and_its_end_is_told(gate: PendingGrammars) -> None:
    gate.admit(arrived("digits"))
    gate.admit(arrived("words"))
    digits, words = gate.take_prepare_messages()
    assert gate.admit(Aborted("digits")) == (Aborted("digits"),)
    assert [gate.take(GrammarPrepared(rank, digits.number)) for rank in (1, 3)] == [(), ()]
    gate.take(GrammarPrepared(1, words.number))
    assert gate.take(GrammarPrepared(3, words.number)) == (arrived("words"),)


def test_one_that_left_before_the_ranks_were_asked_costs_them_nothing(gate: PendingGrammars) -> None:
    gate.admit(arrived("digits"))
    gate.admit(Aborted("digits"))
    assert gate.take_prepare_messages() == []


def test_other_ranks_are_asked_anew_for_all_that_wait(gate: PendingGrammars) -> None:
    gate.admit(arrived("digits"))
    (first,) = gate.take_prepare_messages()
    gate.take(GrammarPrepared(1, first.number))
    gate.admit(arrived("words"))
    gate.restart()
    assert [question.grammar for question in gate.take_prepare_messages()] == ["digits", "words"]
    assert gate.take(GrammarPrepared(3, first.number)) == ()  # the rank that had answered is gone
    assert gate.take(GrammarPrepared(1, first.number)) == (arrived("digits"),)
