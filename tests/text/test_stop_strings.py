"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_medha.text.stop_strings import StopMatcher


def run(pieces: list[str], stops: list[str], *, is_included: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, is_included=is_included)
    sent = []
    for piece in pieces:
        text, stop = matcher.push(piece)
        sent.append(text)
        if stop is not None:
            return sent, stop
    return [*sent, matcher.finish()], None


def test_a_stop_string_across_pieces_is_found_and_its_beginning_was_never_sent() -> None:
    assert run(["one EN", "D tw", "o"], ["END"]) == (["one ", ""], "END")


def test_text_that_only_began_like_a_stop_string_is_sent_as_soon_as_that_is_clear() -> None:
    assert run(["one EN", "Emy"], ["END"]) == (["one ", "ENEmy", ""], None)


def test_the_stop_string_is_part_of_the_text_when_asked_for() -> None:
    assert run(["a", "b", "cd"], ["bc"], is_included=True) == (["a", "", "bc"], "bc")


def test_what_was_held_back_comes_at_the_end() -> None:
    assert run(["abc<"], ["<|end|>"]) == (["abc", "<"], None)


def test_of_two_stop_strings_complete_at_once_the_longer_one_counts() -> None:
    assert run(["xabc"], ["c", "abc"]) == (["x"], "abc")


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    assert run(["aab", "aabaac"], ["aabaac"]) == (["", "aab"[:3]], "aabaac")


def test_before_min_tokens_a_stop_string_is_only_text() -> None:
    matcher = StopMatcher(["no"], is_included=False)
    assert matcher.push("no", is_armed=False).text == "no"
    assert matcher.push(" no") == (" ", "no")


small_text = st.text("ab", max_size=20)


@pytest.mark.parametrize("is_included", [False, True])
@given(pieces=st.lists(small_text, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_how_text_is_cut_changes_nothing(pieces: list[str], stops: list[str], is_included: bool) -> None:
    whole = "".join(pieces)
    expected, stop = whole, None
    for end in range(1, len(whole) + 1):  # the plain way: the first place at which any stop string ends
        complete = sorted((s for s in stops if whole[:end].endswith(s)), key=len)
        if complete:
            stop = complete[-1]
            expected = whole[:end] if is_included else whole[: end - len(stop)]
            break
    sent, found = run(pieces, stops, is_included=is_included)
    assert ("".join(sent), found) == (expected, stop)
