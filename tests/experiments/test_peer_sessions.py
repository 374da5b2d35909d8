"""Sessions against peers without any server: what a client sends, what a turn is held to, what a table says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from experiments.lib.http_stream import Streamed, _note_ids_and_hits
from experiments.peers import report
from experiments.peers.load import Mixed, Seen, Turn
from experiments.peers.models import MODELS
from experiments.peers.plan import LONGS_8K, Cell, Sizes, load_of, mixed_load
from experiments.peers.report import verdicts
from experiments.peers.results import Results
from experiments.peers.run import _refuse_other_settings
from experiments.peers.servers import servers
from experiments.peers.sessions import BesideSessions, LonePrefill, Sessions, mean_think_s
from experiments.peers.store import Store

ABOUT = {"server_cpu_s": 1.0, "server_cores": 1.0, "other_cores": 0.0, "rate_per_s": None}


class FakeEndpoint:
    """Completes at once with ids of its own, and keeps the prompts of turns."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.outputs: list[list[int]] = []

    async def ask(self, tokens: list[int], num_outputs: int, *, is_long: bool = False) -> Streamed:
        await asyncio.sleep(0)
        return Streamed(len(tokens), 0.0, [1.0] * num_outputs)

    async def ask_turn(self, tokens: list[int], num_outputs: int) -> Streamed:
        self.prompts.append(list(tokens))
        self.outputs.append([-1 - len(self.prompts)] * num_outputs)
        return Streamed(len(tokens), 0.0, [1.0] * num_outputs, token_ids=self.outputs[-1], num_cached_tokens=0)


def test_a_turn_is_the_last_prompt_the_servers_own_output_and_new_tokens():
    endpoint = FakeEndpoint()
    seen = asyncio.run(Sessions(1, 4096, 0.0).run(endpoint, 11))  # type: ignore[arg-type]
    assert len(seen.turns) == len(endpoint.prompts) == 4
    for earlier, output, later in zip(endpoint.prompts, endpoint.outputs, endpoint.prompts[1:], strict=False):
        assert later[: len(earlier) + len(output)] == earlier + output
        assert len(later) > len(earlier) + len(output)
    # The last output token's KV has not been computed.
    assert [turn.num_reusable_tokens for turn in seen.turns[1:]] == [
        len(prompt) + len(output) - 1 for prompt, output in zip(endpoint.prompts, endpoint.outputs, strict=False)
    ][:-1]


def test_no_two_sessions_share_a_prompt():
    endpoint = FakeEndpoint()
    asyncio.run(Sessions(3, 4096, 0.0).run(endpoint, 11))  # type: ignore[arg-type]
    assert len({tuple(prompt[:64]) for prompt in endpoint.prompts}) == 3


@pytest.mark.parametrize("context_len", [2048, 4096, 16384, 32768])
def test_all_sessions_of_all_seeds_have_the_same_turns_in_another_order(context_len: int):
    sessions = Sessions(8, context_len, 5.0)
    mixes = set()
    for seed, index in ((11, 0), (11, 1), (12, 0)):
        turns = sessions.planned(seed, index)
        assert turns == sessions.planned(seed, index)
        thinks = sorted(turn.think_s for turn in turns[1:])
        new, outputs = [turn.num_new_tokens for turn in turns], [turn.num_output_tokens for turn in turns]
        mixes.add((tuple(sorted(new)), tuple(sorted(outputs)), tuple(thinks)))
        assert turns[0].think_s == 0.0
        assert sum(thinks) / len(thinks) == pytest.approx(5.0)
        num_tokens = sum(new) + sum(outputs)
        assert context_len - len(turns) <= num_tokens <= context_len
    assert len(mixes) == 1


def test_a_server_that_does_not_report_the_ids_of_its_output_ends_the_run():
    class Silent(FakeEndpoint):
        async def ask_turn(self, tokens: list[int], num_outputs: int) -> Streamed:
            return Streamed(len(tokens), 0.0, [1.0] * num_outputs)

    with pytest.raises(SystemExit, match="0 ids of"):
        asyncio.run(Sessions(1, 4096, 0.0).run(Silent(), 11))  # type: ignore[arg-type]


def test_sessions_beside_the_mixed_stream_end_with_it_and_are_counted_apart():
    endpoint = FakeEndpoint()
    load = BesideSessions(Mixed(20, 1000.0, (100, 200)), Sessions(2, 2048, 1e-4))
    seen = asyncio.run(load.run(endpoint, 11))  # type: ignore[arg-type]
    assert (len(seen.short_ttft_s), len(seen.long_ttft_s)) == (19, 1)
    assert len(seen.turns) == len(endpoint.prompts) > 0


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
    turn_s = 1e-3 * context_len / len(Sessions(num_sessions, context_len, 1.0).planned(0, 0))
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


@pytest.mark.parametrize(
    ("events", "ids", "num_cached"),
    [
        ([{"choices": [{"text": "a", "token_ids": [7]}]}, {"choices": [{"text": "b", "token_ids": [8, 9]}]},
          {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 128}}}], [7, 8, 9], 128),
        ([{"choices": [{"text": "a"}], "__verbose": {"tokens": [7]}},
          {"choices": [{"text": ""}], "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}], [7], 0),
        ([{"choices": [{"text": "a"}]}, {"choices": [], "usage": {"prompt_tokens_details": None}}], [], None),
    ],
)  # fmt: skip
def test_ids_and_hits_are_read_as_each_server_reports_them(
    events: list[dict[str, object]], ids: list[int], num_cached: int | None
):
    result = Streamed(1, 0.0)
    for event in events:
        _note_ids_and_hits(result, event)
    assert (result.token_ids, result.num_cached_tokens) == (ids, num_cached)


def measured(store: Store, server: str, ttft_s: list[float], num_cached: int | None, load: str = "sessions-8-4096"):
    """One session: turns of 1,000 new tokens, on a server that computes 1,000 tokens/s."""
    for length in (256, 1024, 4096):
        store.write(Cell(server, f"prefill-{length}", 11), Seen(rates=[1000.0]), ABOUT)
    turns = [
        Turn(0, number, 1000 * number, 1000 * (number + 1), num_cached if number else 0, 10, seconds)
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


@pytest.mark.parametrize("name", list(MODELS))
def test_the_longest_lone_prompt_of_a_model_fits_every_server(name: str):
    model = MODELS[name]
    assert max(model.lengths) < model.max_context_len
    assert max(model.lengths) < model.llama_slot_tokens
