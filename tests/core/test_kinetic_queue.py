"""The kinetic tournament against a plain sort."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.scheduling.kinetic_queue import ITEM, ITEM_ID, LEVEL, KineticQueue, RankedEntry
from megatron_medha.core.scheduling.kinetic_tournament import Entry, KineticTournament
from megatron_medha.core.scheduling.policies import Priority

# Lines as policies make them: constant, all of one slope, or each of its own; few values, so that ties happen.
LINES = st.builds(
    Priority,
    st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-1e3, 1e3)),
    st.one_of(st.just(0.0), st.just(-1.0), st.floats(-50.0, 0.0)),
)
LEVELS = st.sampled_from([0, 0, 0, 1, -1, 2**33])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40), LEVELS, LINES, st.integers(0, 2)),
        st.tuples(st.just("remove"), st.integers(0, 40)),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 1e-6, 0.3, 7.0, 1e4])),
        st.tuples(st.just("look"), st.integers(1, 41)),
    ),
    max_size=120,
)


Lines = dict[str, tuple[int, Priority, float]]  # level, line, arrival by id


def sorted_ids(lines: Lines, now_s: float) -> list[tuple[int, float, float, str]]:
    return sorted((level, line.at(now_s), arrival_s, name) for name, (level, line, arrival_s) in lines.items())


def in_order(queue: KineticQueue, now_s: float) -> Iterator[RankedEntry]:
    """Places of all, as of now."""
    places = queue.first_entries(now_s)
    while places:
        yield from places
        places = queue.more_entries(now_s)


def assert_in_order(queue: KineticQueue, lines: Lines, now_s: float, count: int) -> None:
    """The first `count` come in order of priority; only lines that cross within rounding may have changed places."""
    expected = sorted_ids(lines, now_s)
    got = [place[ITEM_ID] for place, _ in zip(in_order(queue, now_s), range(count))]
    assert len(set(got)) == len(got) == min(count, len(lines))
    for name, (level, value, arrival_s, expected_name) in zip(got, expected):
        if name != expected_name:
            other_level, line, other_arrival_s = lines[name]
            assert other_level == level
            assert abs(line.at(now_s) - value) <= 1e-9 * (1.0 + abs(line.at_zero) + abs(line.slope * now_s))
            if line.at(now_s) == value and lines[expected_name][1] == line:
                assert other_arrival_s <= arrival_s


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_it_gives_the_order_of_a_sort_after_any_additions_removals_and_waits(steps: list[tuple]) -> None:
    queue, lines, now_s = KineticQueue(), {}, 0.0
    for kind, *values in steps:
        if kind == "add":
            number, level, line, arrival_s = values
            lines[f"r{number}"] = (level, line, float(arrival_s))
            queue.add(f"r{number}", level, line, float(arrival_s), None, now_s)
        elif kind == "remove":
            if f"r{values[0]}" in lines:
                del lines[f"r{values[0]}"]
                queue.remove(f"r{values[0]}", now_s)
        elif kind == "advance":
            now_s += values[0]
        else:
            assert_in_order(queue, lines, now_s, values[0])
        assert len(queue) == len(lines)
    assert_in_order(queue, lines, now_s, len(lines))


def test_a_thousand_lines_stay_in_order_while_time_goes_on() -> None:
    draw = random.Random(0)
    queue, lines = KineticQueue(), {}
    for number in range(1000):
        work_s = 10 ** draw.uniform(-3, 2)
        line = Priority(draw.uniform(0, 100) / work_s, -1.0 / work_s)
        lines[f"r{number}"] = (draw.choice((0, 0, 3)), line, float(number))
        queue.add(f"r{number}", *lines[f"r{number}"], None, 0.0)
    now_s = 0.0
    for _ in range(200):
        now_s += draw.expovariate(5.0)
        name = f"r{draw.randrange(1000)}"
        if name in lines and draw.random() < 0.5:
            queue.remove(name, now_s)
            del lines[name]
        assert_in_order(queue, lines, now_s, 20)
    assert_in_order(queue, lines, now_s, len(lines))


def test_equal_priorities_go_by_arrival_and_then_by_id() -> None:
    queue = KineticQueue()
    for name, arrival_s in (("b", 1.0), ("c", 0.0), ("a", 1.0)):
        queue.add(name, 0, Priority(3.0, -1.0), arrival_s, None, 0.0)
    assert [place[ITEM_ID] for place in in_order(queue, 10.0)] == ["c", "a", "b"]


def test_adding_an_id_again_moves_it() -> None:
    queue = KineticQueue()
    queue.add("a", 0, Priority(1.0), 0.0, None, 0.0)
    queue.add("b", 0, Priority(2.0), 0.0, None, 0.0)
    queue.add("a", 0, Priority(3.0), 0.0, None, 0.0)
    assert [place[ITEM_ID] for place in in_order(queue, 0.0)] == ["b", "a"] and len(queue) == 2


def test_an_empty_queue_yields_nothing() -> None:
    queue = KineticQueue()
    assert list(in_order(queue, 0.0)) == []
    queue.add("a", 0, Priority(1.0), 0.0, None, 0.0)
    queue.remove("a", 0.0)
    assert list(in_order(queue, 1.0)) == [] and "a" not in queue


def test_a_lower_level_goes_first_whatever_the_lines_do() -> None:
    queue = KineticQueue()
    queue.add("falls fast", 1, Priority(0.0, -50.0), 0.0, None, 0.0)
    queue.add("waits", 0, Priority(1e6), 9.0, None, 0.0)
    assert [place[ITEM_ID] for place in in_order(queue, 1e6)] == ["waits", "falls fast"]


def test_places_come_with_level_value_arrival_and_item_from_the_front_and_from_behind_it() -> None:
    queue = KineticQueue()
    for number in range(60):
        queue.add(f"r{number:02}", 1, Priority(float(number), -0.5), 2.0, number, 0.0)
    places = list(in_order(queue, 4.0))
    assert places == [(1, number - 2.0, 2.0, f"r{number:02}", number) for number in range(60)]
    assert places[0][LEVEL] == 1 and places[5][ITEM] == 5


def test_a_look_shows_a_few_and_says_whether_there_are_more() -> None:
    queue = KineticQueue()
    assert not queue.has_rest and queue.first_entries(0.0) == [] == queue.more_entries(0.0)
    for number in range(40):
        queue.add(f"r{number:02}", 0, Priority(float(number)), 0.0, None, 0.0)
    shown = [place[ITEM_ID] for place in queue.first_entries(0.0)]
    assert queue.has_rest and shown == [f"r{number:02}" for number in range(16)]
    more = [place[ITEM_ID] for place in queue.more_entries(0.0)]
    assert more == [f"r{number:02}" for number in range(16, 20)]
    assert len(queue) == 40 and all(f"r{number:02}" in queue for number in range(40))


def test_one_behind_the_front_that_falls_before_it_is_shown_first() -> None:
    queue = KineticQueue()
    for number in range(40):
        queue.add(f"r{number:02}", 0, Priority(float(number)), 0.0, None, 0.0)
    queue.add("falls", 0, Priority(100.0, -10.0), 0.0, None, 0.0)
    assert "falls" not in [place[ITEM_ID] for place in queue.first_entries(0.0)]
    assert [place[ITEM_ID] for place in queue.first_entries(9.99)][:2] == ["r00", "falls"]
    assert queue.first_entries(10.01)[0][ITEM_ID] == "falls"


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 0)), min_size=1, max_size=30), st.integers(0, 6))
def test_the_first_of_a_tournament_is_the_first_of_a_sort_at_every_moment(
    lines: list[tuple[int, int]], removed: int
) -> None:
    tournament, left = KineticTournament(), {}
    for number, (at_zero, slope) in enumerate(lines):
        entry = Entry(number % 2, float(at_zero), float(slope), float(number % 3), f"r{number:02}", None)
        tournament.add(entry, 0.0)
        left[entry.item_id] = entry
        assert len(tournament) == len(left) and entry.item_id in tournament
    for now_s in (0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 100.0):
        ranked = sorted(
            (each.level, each.at_zero + each.slope * now_s, each.arrival_s, name) for name, each in left.items()
        )
        first = tournament.first(now_s)
        assert (first.item_id if first is not None else None) == (ranked[0][3] if ranked else None)
        if ranked and removed:
            name = ranked[min(removed, len(ranked)) - 1][3]
            assert tournament.pop(name, now_s) is left.pop(name)
            assert name not in tournament and len(tournament) == len(left)


def test_one_from_behind_the_front_that_is_added_again_is_there_once_and_at_its_new_place() -> None:
    for num_newcomers in (0, 40):  # few join the front, many go behind it again
        queue = KineticQueue()
        for number in range(50):
            queue.add(f"r{number:02}", 0, Priority(float(number)), 0.0, None, 0.0)
        queue.first_entries(0.0)
        for number in range(num_newcomers):
            queue.add(f"n{number:02}", 0, Priority(100.0 + number), 0.0, None, 0.0)
        queue.add("r49", 0, Priority(-1.0), 0.0, None, 0.0)
        assert len(queue) == 50 + num_newcomers
        found = [place[ITEM_ID] for place in in_order(queue, 0.0)]
        assert found[:2] == ["r49", "r00"] and len(found) == len(set(found)) == 50 + num_newcomers
