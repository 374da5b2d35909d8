"""Sessions against peers without any server: what a client sends, what a turn is held to, what a table says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from experiments.lib.http_stream import Streamed
from experiments.peers import report
from experiments.peers.load import Mixed, Seen, Turn
from experiments.peers.models import MODELS
from experiments.peers.plan import LONGS_8K, Cell, Sizes, load_of, mixed_load
from experiments.peers.report import verdicts
from experiments.peers.results import Results
from experiments.peers.run import _refuse_other_settings
from experiments.peers.servers import servers
from experiments.peers.sessions import BesideSessions, LonePrefill, Sessions, mean_think_s, turn_of
from experiments.peers.store import Store
from megatron_medha.bench.load_generator import SentRequest
from megatron_medha.bench.turn_table import SentTurn
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending, RequestStats
from megatron_medha.workload.sessions import TurnRow, build_sessions

ABOUT = {"server_cpu_s": 1.0, "server_cores": 1.0, "other_cores": 0.0, "rate_per_s": None}


class FakeEndpoint:
    """Completes at once."""

    async def ask(self, tokens: list[int], num_outputs: int, *, is_long: bool = False) -> Streamed:
        await asyncio.sleep(0)
        return Streamed(len(tokens), 0.0, [1.0] * num_outputs)


def a_turn(session: str = "a", number: int = 0) -> Turn:
    return Turn(session, number, 0, 100, 0, 10, 0.5)


@pytest.mark.parametrize("context_len", [2048, 4096, 16384, 32768])
def test_all_sessions_of_all_seeds_have_the_same_turns_in_another_order(context_len: int):
    sessions = Sessions(8, context_len, 5.0)
    mixes = set()
    for seed, index in ((11, 0), (11, 1), (12, 0)):
        rows = sessions.rows(seed, index, "a")
        assert rows == sessions.rows(seed, index, "a")
        (session,) = build_sessions(rows, 1024)
        new = [turn.num_new_tokens for turn in session.turns]
        outputs = [turn.num_output_tokens for turn in session.turns]
        thinks = sorted(turn.gap_s for turn in session.turns[1:])
        mixes.add((tuple(sorted(new)), tuple(sorted(outputs)), tuple(thinks)))
        assert session.turns[0].gap_s == 0.0
        assert sum(thinks) / len(thinks) == pytest.approx(5.0)
        assert context_len - len(new) <= sum(new) + sum(outputs) <= context_len
    assert len(mixes) == 1


def test_a_turns_prompt_is_all_of_the_last_one_its_output_and_new_tokens():
    (session,) = build_sessions(Sessions(1, 4096, 0.0).rows(11, 0, "a"), 1024)
    for earlier, later in zip(session.turns, session.turns[1:], strict=False):
        before = (*earlier.prompt, *earlier.output)
        assert later.prompt[: len(before)] == before
        assert later.num_new_tokens == later.num_prompt_tokens - earlier.num_prompt_tokens - earlier.num_output_tokens


def test_no_two_loads_of_one_visit_share_a_text(monkeypatch: pytest.MonkeyPatch):
    texts: list[set[str]] = []

    async def play(endpoint: object, rows: list[TurnRow], *_: object) -> None:
        texts.append({row.session for row in rows})

    monkeypatch.setattr("experiments.peers.sessions.play", play)
    for sessions in (Sessions(1, 4096, 0.0), Sessions(8, 4096, 0.0), Sessions(8, 8192, 0.0)):
        asyncio.run(sessions.run(FakeEndpoint(), 11))  # type: ignore[arg-type]
    assert [len(names) for names in texts] == [1, 8, 8]
    assert len(set.union(*texts)) == 17
    beside = load_of(Cell("medha", "beside-4-4096", 11), Sizes(), None, 1.0, "vllm", 1.0)  # type: ignore[arg-type]
    mixed = load_of(Cell("medha", mixed_load(LONGS_8K), 11), Sizes(), None, 1.0, "vllm")  # type: ignore[arg-type]
    assert isinstance(beside, BesideSessions) and isinstance(mixed, Mixed)
    assert beside.mixed.text != mixed.text and beside.mixed.arrivals(11) == mixed.arrivals(11)


def test_sessions_beside_the_mixed_stream_end_with_it_and_are_counted_apart(monkeypatch: pytest.MonkeyPatch):
    async def play(endpoint: object, rows: object, seed: int, note: Callable[[Turn], object], max_live: int) -> None:
        assert max_live == 2
        while True:
            note(a_turn())
            await asyncio.sleep(0)

    monkeypatch.setattr("experiments.peers.sessions.play", play)
    load = BesideSessions(Mixed(20, 1000.0, (100, 200)), Sessions(2, 2048, 1e-4))
    seen = asyncio.run(load.run(FakeEndpoint(), 11))  # type: ignore[arg-type]
    assert (len(seen.short_ttft_s), len(seen.long_ttft_s)) == (19, 1)
    assert seen.turns and seen.num_prompt_tokens < 20 * 256


def sent_turn(number: int, num_new_tokens: int, ending: Ending = Ending.FINISHED) -> SentTurn:
    """Of 1,000 prompt tokens; due at 2 s, sent at 2.01, first token at 2.5."""
    request = Request(request_id="r", num_prompt_tokens=1000, max_output_tokens=20, arrival_s=2.0)
    outcome = RequestStats(request=request, ending=ending, why="full", first_token_s=2.5, num_cached_tokens=640)
    return SentTurn("a", number, num_new_tokens, SentRequest(outcome=outcome, send_lag_s=0.01, token_times_s=(2.5,)))


def test_what_a_turn_could_find_in_a_cache_ends_before_the_last_output_token():
    assert turn_of(sent_turn(1, 1000)) == Turn("a", 0, 0, 1000, 640, 20, pytest.approx(0.49))
    assert turn_of(sent_turn(3, 300)) == Turn("a", 2, 699, 1000, 640, 20, pytest.approx(0.49))


def test_a_turn_that_failed_ends_the_run():
    with pytest.raises(SystemExit, match="a turn of 1000 tokens failed: full"):
        turn_of(sent_turn(3, 300, Ending.REJECTED))


@pytest.mark.parametrize("seed", range(20))
def test_the_lone_prefill_that_was_fitted_is_never_negative_and_near_what_was_measured(seed: int):
    rng = Random(seed)
    true = LonePrefill(rng.uniform(0.0, 0.05), rng.uniform(1e-5, 1e-3), rng.uniform(0.0, 1e-7))
    exact = {length: true.seconds(0, length) for length in (256, 1024, 4096, 16384)}
    noisy = {length: seconds * rng.uniform(0.97, 1.03) for length, seconds in exact.items()}
    found = LonePrefill.fitted(noisy)
    assert min(found.constant_s, found.token_s, found.pair_s) >= 0.0
    assert all(found.seconds(0, length) == pytest.approx(seconds, rel=0.07) for length, seconds in exact.items())
    again = LonePrefill.fitted(exact)
    assert again.seconds(15000, 16000) == pytest.approx(true.seconds(15000, 16000), rel=1e-3)


def test_new_tokens_alone_take_what_a_longer_prompt_takes_more():
    lone = LonePrefill(0.01, 1e-4, 1e-8)
    assert lone.seconds(0, 3000) + lone.seconds(3000, 4000) - lone.constant_s == pytest.approx(lone.seconds(0, 4000))


@pytest.mark.parametrize("num_sessions", [1, 8])
def test_pauses_keep_the_server_as_busy_as_asked(num_sessions: int):
    lone, context_len = LonePrefill(0.0, 1e-3, 0.0), 4096
    think_s = mean_think_s(lone, 0.0, num_sessions, context_len, 0.5)
    turn_s = 1e-3 * context_len / len(Sessions(num_sessions, context_len, 1.0).rows(0, 0, "a"))
    assert num_sessions * turn_s / (turn_s + think_s) == pytest.approx(0.5)


def test_all_servers_get_the_same_pauses_whatever_is_measured_later(tmp_path: Path):
    store, cell = Store(tmp_path), Cell("medha", "sessions-8-4096", 11)
    with pytest.raises(SystemExit, match="give --think"):
        load_of(cell, Sizes(), store, None, "vllm")
    for load in ("prefill-1024", "prefill-4096", "decode-8"):
        store.write(Cell("vllm", load, 11), Seen(rates=[1000.0]), ABOUT)
    first = load_of(cell, Sizes(), store, None, "vllm")
    store.write(Cell("vllm", "prefill-1024", 12), Seen(rates=[9000.0]), ABOUT)
    assert load_of(cell, Sizes(), store, None, "vllm") == first
    assert isinstance(first, Sessions) and first.think_s > 0.0
    assert load_of(cell, Sizes(), store, None, "vllm", think_s=2.5) == Sessions(8, 4096, 2.5)


def measured(store: Store, server: str, ttft_s: list[float], num_cached: int | None, load: str = "sessions-8-4096"):
    """One session: turns of 1,000 new tokens, on a server that computes 1,000 tokens/s."""
    for length in (256, 1024, 4096):
        store.write(Cell(server, f"prefill-{length}", 11), Seen(rates=[1000.0]), ABOUT)
    turns = [
        Turn("a", number, 1000 * number, 1000 * (number + 1), num_cached if number else 0, 10, seconds)
        for number, seconds in enumerate(ttft_s)
    ]
    store.write(Cell(server, load, 11), Seen(took_s=10.0, turns=turns), ABOUT)


def missed(store: Store) -> list[tuple[str, str]]:
    """Question and bar of each, shortened."""
    found = [one for one in verdicts(Results(store.read_all()), "medha") if "seed" in one.question and not one.is_kept]
    return [(one.question.partition(": ")[2].removeprefix("turn TTFT ").split(" ")[0], one.bar) for one in found]


@pytest.mark.parametrize(
    ("ttft_s", "num_cached", "expected"),
    [
        ([9.0, 1.1, 1.1, 1.1], 1500, []),   # the first turn has nothing to find
        ([9.0, 1.1, 1.1, 1.9], 1500, [("p99", "1.50 (vllm)")]),
        ([9.0, 1.1, 1.1, 2.5], 1500, [("p99", "2"), ("p99", "1.50 (vllm)")]),
        ([9.0, 1.3, 1.3, 1.4], 1500, [("p50", "1.2")]),
        ([9.0, 1.1, 1.1, 1.1], 1300, [("hit", "42.0% (vllm)")]),
        ([9.0, 1.1, 1.1, 1.1], None, [("hit", "42.0% (vllm)")]),
    ],
)
def test_turns_are_held_to_their_new_tokens_and_to_the_better_peer(
    tmp_path: Path, ttft_s: list[float], num_cached: int | None, expected: list[tuple[str, str]]
):
    store = Store(tmp_path)
    measured(store, "medha", ttft_s, num_cached)
    measured(store, "vllm", [9.0, 1.4, 1.4, 1.5], 1400)
    measured(store, "llama.cpp", [9.0, 3.0, 3.0, 3.0], 1000)
    assert missed(store) == expected


def test_the_stream_beside_sessions_is_held_to_the_stream_without(tmp_path: Path):
    store = Store(tmp_path)
    for load, short_s in ((mixed_load(LONGS_8K), 0.1), ("beside-4-4096", 0.13)):
        seen = Seen(took_s=1.0, short_ttft_s=[short_s], long_ttft_s=[1.0], short_gaps_s=[0.01])
        store.write(Cell("medha", load, 11), seen, ABOUT)
    (verdict,) = (one for one in verdicts(Results(store.read_all()), "medha") if "beside" in one.question)
    assert not verdict.is_kept and "1.30x" in verdict.figure


def test_the_table_names_hits_model_and_instruction_sets(tmp_path: Path):
    store = Store(tmp_path)
    measured(store, "medha", [1.0, 1.0], 900)
    store.write(Cell("medha", "decode-1", 11), Seen(rates=[1.0]), {**ABOUT, "model": "28m", "instruction_sets": "avx2"})
    table = report.as_markdown(Results(store.read_all()), "medha")
    assert "Model 28m; instruction sets avx2" in table
    assert "| medha | 11 | 30.0 | 33.3 |" in table


def test_cells_of_another_model_or_cpu_are_refused(tmp_path: Path):
    store = Store(tmp_path)
    store.write(Cell("medha", "decode-1", 11), Seen(rates=[1.0]), {**ABOUT, "model": "28m", "instruction_sets": "avx2"})
    _refuse_other_settings(store, {"model": "28m", "instruction_sets": "avx2"}, tmp_path)
    with pytest.raises(SystemExit, match="give another --out"):
        _refuse_other_settings(store, {"model": "440m", "instruction_sets": "avx2"}, tmp_path)


def test_8_bit_weights_are_compared_with_8_bit_weights(tmp_path: Path):
    store = Store(tmp_path)
    for server, rate in {"medha": 10.0, "medha-int8": 20.0, "llama.cpp": 9.0, "llama.cpp-q8_0": 30.0}.items():
        store.write(Cell(server, "decode-1", 11), Seen(rates=[rate]), ABOUT)
    results = Results(store.read_all())
    assert [(one.is_kept, "q8_0" in one.bar) for one in verdicts(results, "medha")] == [(True, False)]
    assert [(one.is_kept, "q8_0" in one.bar) for one in verdicts(results, "medha-int8")] == [(False, True)]


def test_every_server_is_started_without_bf16_instructions_where_these_are_off(tmp_path: Path):
    for name, server in servers(2, with_bf16=False).items():
        wanted = "LD_LIBRARY_PATH" if name.startswith("llama.cpp") else "ONEDNN_MAX_CPU_ISA"
        assert wanted in server.environment(tmp_path)
        assert wanted not in servers(2)[name].environment(tmp_path)
        if server.is_ours:
            assert any(word.startswith("model.instruction_set=avx") for word in server.command(tmp_path, tmp_path, 1))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_longest_lone_prompt_of_a_model_fits_every_server(name: str):
    model = MODELS[name]
    assert max(model.lengths) < model.max_context_len
    assert max(model.lengths) < model.llama_slot_tokens
