"""The comparison with peers without any server: what is resumed, what rate a stream has, what counts as a bar kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from experiments.lib.http_stream import Streamed
from experiments.peers import report
from experiments.peers.load import LONGS_AT_ONCE_IN_ALL, LongsAtOnce, Mixed, Seen
from experiments.peers.plan import LONGS_8K, Cell, Sizes, load_of, mixed_load, named_visits, plans
from experiments.peers.report import verdicts
from experiments.peers.results import Results
from experiments.peers.servers import servers
from experiments.peers.store import Store

ABOUT = {"server_cpu_s": 1.0, "server_cores": 1.0, "other_cores": 0.0, "rate_per_s": None}


def write(store: Store, server: str, load: str, seed: int = 11, **seen: object) -> None:
    store.write(Cell(server, load, seed), Seen(**seen), ABOUT)  # type: ignore[arg-type]


def test_every_plan_asks_only_for_servers_there_are_and_for_no_cell_twice():
    known = servers(2)
    for visits in plans(Sizes()).values():
        cells = [cell for visit in visits for cell in visit.cells]
        assert len(set(cells)) == len(cells)
        assert {visit.server for visit in visits} <= set(known)


def test_every_plan_measures_what_the_rate_comes_from_before_its_first_mixed_stream():
    for visits in plans(Sizes()).values():
        cells = [cell for visit in visits for cell in visit.cells]
        rated = [index for index, cell in enumerate(cells) if cell.load.startswith(("mixed", "sessions", "beside"))]
        before = {cell.load for cell in cells[: min(rated, default=0)] if cell.server == "vllm"}
        assert not rated or ("decode-8" in before and "prefill-1024" in before)


def test_cells_are_asked_for_by_the_names_of_their_files_and_each_server_starts_once():
    names = ["llama.cpp.longs-4.11", "medha.mixed-8192-16384.12", "llama.cpp.prefill-32768.13"]
    visits = named_visits(names, servers(2))
    assert [visit.server for visit in visits] == ["llama.cpp", "medha"]
    assert sorted(cell.name for visit in visits for cell in visit.cells) == sorted(names)


@pytest.mark.parametrize("name", ["medha.longs-4", "medha.longs-0.11", "nobody.longs-4.11", "medha.mixed-8192.11"])
def test_what_is_no_cell_of_a_known_server_is_refused(name: str):
    with pytest.raises(SystemExit, match="is no cell"):
        named_visits([name], servers(2))


def test_a_cell_that_was_written_is_not_run_again(tmp_path: Path):
    store, cell = Store(tmp_path), Cell("vllm", "decode-1", 11)
    assert not store.has(cell)
    store.write(cell, Seen(rates=[1.0]), ABOUT)
    assert Store(tmp_path).has(cell)
    assert not Store(tmp_path).has(Cell("vllm", "decode-1", 12))


def test_a_half_written_cell_does_not_count(tmp_path: Path):
    (tmp_path / "vllm.decode-1.11.draft").write_text('{"cell": {"ser')
    store = Store(tmp_path)
    assert not store.has(Cell("vllm", "decode-1", 11))
    assert store.read_all() == []


def test_the_stream_keeps_the_reference_busy_as_asked(tmp_path: Path):
    store = Store(tmp_path)
    for length in (1024, 8192, 16384):
        write(store, "vllm", f"prefill-{length}", rates=[1000.0])
    write(store, "vllm", "decode-8", rates=[1000.0])
    # 160 and 12288 tokens of prompt at 1,000 tokens/s, 40 and 24 of answer.
    work_s = 0.95 * (0.160 + 0.040) + 0.05 * (12.288 + 0.024)
    assert store.rate("vllm", LONGS_8K, 0.7) == pytest.approx(0.7 / work_s, rel=1e-3)


def test_all_servers_get_one_rate_whatever_is_measured_later(tmp_path: Path):
    store = Store(tmp_path)
    write(store, "vllm", "prefill-1024", rates=[1000.0])
    write(store, "vllm", "decode-8", rates=[1000.0])
    before = store.rate("vllm", LONGS_8K, 0.7)
    write(store, "vllm", "prefill-1024", seed=12, rates=[9000.0])
    assert store.rate("vllm", LONGS_8K, 0.7) == before


def test_a_rate_that_nothing_was_measured_for_is_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(SystemExit, match="give --rate"):
        load_of(Cell("medha", mixed_load(LONGS_8K), 11), Sizes(), Store(tmp_path), None, "vllm")


def test_the_stream_of_a_seed_is_the_same_for_every_server_and_has_its_share_of_longs():
    stream = Mixed(100, 2.0, LONGS_8K).arrivals(11)
    assert stream == Mixed(100, 2.0, LONGS_8K).arrivals(11) != Mixed(100, 2.0, LONGS_8K).arrivals(12)
    assert sum(arrival.is_long for arrival in stream) == 5


def mixed_cell(store: Store, server: str, short_s: float, long_s: float, took_s: float = 10.0) -> None:
    write(
        store, server, mixed_load(LONGS_8K), took_s=took_s, num_prompt_tokens=1000, short_ttft_s=[short_s],
        long_ttft_s=[long_s], short_gaps_s=[0.05],
    )


@pytest.mark.parametrize(
    ("short_s", "long_s", "took_s", "missed"),
    [
        (0.5, 7.0, 10.0, []),
        (0.7, 7.0, 10.0, ["short p99 TTFT"]),
        (0.5, 9.0, 10.0, ["long p50 TTFT"]),
        (0.5, 7.0, 11.0, ["throughput"]),
        (1.5, 7.0, 10.0, ["short p99 TTFT", "short p99 TTFT of vllm over ours"]),
    ],
)
def test_one_run_of_ours_is_held_to_the_best_of_both_vllm_settings(
    tmp_path: Path, short_s: float, long_s: float, took_s: float, missed: list[str]
):
    store = Store(tmp_path)
    mixed_cell(store, "medha", short_s, long_s, took_s)
    mixed_cell(store, "vllm", 14.0, 8.0)
    mixed_cell(store, "vllm-cap-64", 0.6, 15.0)
    found = [one.question.partition(": ")[2] for one in verdicts(Results(store.read_all()), "medha") if not one.is_kept]
    assert found == missed


def test_a_lone_prompt_is_held_to_the_better_of_both_peers(tmp_path: Path):
    store = Store(tmp_path)
    for server, rate in {"medha": 900.0, "vllm": 800.0, "llama.cpp": 950.0, "medha-other": 9999.0}.items():
        write(store, server, "prefill-1024", rates=[rate])
    (verdict,) = verdicts(Results(store.read_all()), "medha")
    assert not verdict.is_kept and "llama.cpp" in verdict.bar
    (verdict,) = verdicts(Results(store.read_all()), "medha-other")
    assert verdict.is_kept


def test_the_table_says_where_a_neighbour_was_busy(tmp_path: Path):
    store = Store(tmp_path)
    write(store, "medha", "decode-1", rates=[900.0])
    assert "PROVISIONAL" not in report.as_markdown(Results(store.read_all()), "medha")
    store.write(Cell("vllm", "decode-1", 11), Seen(rates=[1.0]), ABOUT | {"other_cores": 0.6})
    assert "PROVISIONAL" in report.as_markdown(Results(store.read_all()), "medha")


class FakeEndpoint:
    """Answers at once, and notes how many long prompts were under way together."""

    def __init__(self) -> None:
        self.num_longs, self.most_longs, self.all_longs = 0, 0, 0

    async def ask(self, tokens: list[int], num_outputs: int, *, is_long: bool = False) -> Streamed:
        self.num_longs += is_long
        self.all_longs += is_long
        self.most_longs = max(self.most_longs, self.num_longs)
        await asyncio.sleep(0)
        self.num_longs -= is_long
        return Streamed(len(tokens), 0.0, [1.0] * num_outputs)


@pytest.mark.parametrize("at_once", [1, 2, 4, 8])
def test_waves_of_any_size_bring_the_same_long_prompts(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.peers.load.WAVE_SHORTS_PER_S", 1000.0)
    endpoint = FakeEndpoint()
    seen = asyncio.run(LongsAtOnce(at_once, 100).run(endpoint, 1))  # type: ignore[arg-type]
    assert (endpoint.most_longs, endpoint.all_longs) == (at_once, LONGS_AT_ONCE_IN_ALL)
    assert len(seen.long_ttft_s) == LONGS_AT_ONCE_IN_ALL and seen.short_ttft_s
