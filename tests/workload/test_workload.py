"""Workloads: what is drawn and what is read, the same for the same seed; and what is refused."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.request import Request
from megatron_medha.workload.arrivals import ArrivalProcess
from megatron_medha.workload.lengths import LONG_OUTPUT, LONG_PROMPT, SHORT_OUTPUT, SHORT_PROMPT, draw_mix
from megatron_medha.workload.workload import Workload, WorkloadConfig, ZeroLengths

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(text: str, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        return path

    return run


def rows(config: WorkloadConfig, seed: int = 0) -> list[tuple[float, int, int]]:
    return [
        (round(one.arrival_s, 6), one.num_prompt_tokens, one.max_output_tokens)
        for one in Workload(config, seed).requests()
    ]


def refusal(config: WorkloadConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        Workload(config, 0)
    return str(caught.value)


def test_the_quantiles_of_the_mix_have_the_means_of_the_data_they_were_taken_from() -> None:
    # MEDHA's 5% file: short 2,332 and 440, long 452K and 512.
    for table, mean in ((SHORT_PROMPT, 2332), (SHORT_OUTPUT, 440), (LONG_PROMPT, 452_000), (LONG_OUTPUT, 512)):
        assert fmean(table.at((index + 0.5) / 2_000) for index in range(2_000)) == pytest.approx(mean, rel=0.006)


@given(st.floats(0, 1))
def test_a_quantile_lies_within_its_table(probability: float) -> None:
    assert 2 <= SHORT_PROMPT.at(probability) <= 8032


def test_the_share_of_long_requests_is_the_one_asked_for() -> None:
    draw = Random(1)
    lengths = [draw_mix(draw, 0.25)[0] for _ in range(4_000)]
    assert sum(length > 100_000 for length in lengths) / len(lengths) == pytest.approx(0.25, abs=0.02)
    assert not any(8192 <= length <= 100_000 for length in lengths)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([kind for kind in ArrivalProcess if kind is not ArrivalProcess.RECORDED]))
def test_the_same_seed_gives_the_same_requests_every_time_they_are_asked_for(seed: int, kind: ArrivalProcess) -> None:
    config = WorkloadConfig(qps=3.0, num_requests=50, arrivals=kind)
    workload = Workload(config, seed)
    first: list[Request] = list(workload.requests())
    assert list(workload.requests()) == list(Workload(config, seed).requests()) == first
    assert [one.arrival_s for one in first] == sorted(one.arrival_s for one in first)


def test_another_seed_gives_other_requests() -> None:
    config = WorkloadConfig(qps=3.0, num_requests=50)
    assert rows(config, 1) != rows(config, 2)


def test_another_rate_leaves_the_lengths_as_they_were() -> None:
    slow, fast = (rows(WorkloadConfig(qps=qps, num_requests=50)) for qps in (1.0, 4.0))
    assert [row[1:] for row in slow] == [row[1:] for row in fast]
    assert [row[0] for row in slow] == pytest.approx([4 * row[0] for row in fast], abs=1e-5)


@pytest.mark.parametrize("kind", ["constant", "poisson", "gamma", "burst", "diurnal"])
def test_every_arrival_process_keeps_its_mean_rate(kind: str) -> None:
    config = WorkloadConfig(qps=5.0, duration_s=1_200, arrivals=ArrivalProcess(kind))
    assert len(rows(config)) / 1_200 == pytest.approx(5.0, rel=0.06)


def test_gaps_scatter_as_much_as_their_process_says() -> None:
    def cv(**options: object) -> float:
        times_s = [row[0] for row in rows(WorkloadConfig(qps=1.0, num_requests=3_000, **options))]
        gaps_s = [b - a for a, b in zip(times_s, times_s[1:])]
        return pstdev(gaps_s) / fmean(gaps_s)

    assert cv(arrivals=ArrivalProcess.CONSTANT) == pytest.approx(0.0, abs=1e-3)
    assert cv(arrivals=ArrivalProcess.POISSON) == pytest.approx(1.0, rel=0.1)
    assert cv(arrivals=ArrivalProcess.GAMMA, cv=3.0) == pytest.approx(3.0, rel=0.15)


def test_bursts_come_at_the_beginning_of_every_period() -> None:
    config = WorkloadConfig(
        qps=2.0, duration_s=2_000, arrivals=ArrivalProcess.BURST, burst_factor=4.0, burst_s=10.0, period_s=100.0
    )
    times_s = [row[0] for row in rows(config)]
    assert sum(at_s % 100.0 < 10.0 for at_s in times_s) / len(times_s) == pytest.approx(0.4, abs=0.03)


def test_bursts_of_more_than_all_requests_are_refused() -> None:
    config = WorkloadConfig(qps=1.0, num_requests=5, arrivals=ArrivalProcess.BURST, burst_s=100.0, period_s=200.0)
    assert "at most period_s / burst_s = 2" in refusal(config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ours.csv", "arrival_s,prompt_tokens,output_tokens,client_id\n0.5,10,3,9\n2,20,4,9\n"),
        ("ours.csv.gz", "arrival_s,prompt_tokens,output_tokens\n0.5,10,3\n2,20,4\n"),
        ("ours.jsonl", '{"arrival_s":0.5,"prompt_tokens":10,"output_tokens":3}\n\n'
                       '{"arrival_s":2,"prompt_tokens":20,"output_tokens":4}\n'),
        ("vidur.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,10,3\n2.0,20,4\n"),
    ],
)  # fmt: skip
def test_recorded_arrivals_are_taken_as_they_are(write: Write, name: str, text: str) -> None:
    assert rows(WorkloadConfig(path=write(text, name))) == [(0.5, 10, 3), (2.0, 20, 4)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
                      "2023-11-16 18:15:46.6805900,10,3\n2023-11-16 18:15:48.1805900,20,4\n"),
        ("azure2024.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
                          "2024-05-10 00:00:00.009930+00:00,10,3\n2024-05-10 00:00:01.509930+00:00,20,4\n"),
        ("mooncake.jsonl", '{"timestamp":27000,"input_length":10,"output_length":3,"hash_ids":[1]}\n'
                           '{"timestamp":28500,"input_length":20,"output_length":4,"hash_ids":[1]}\n'),
        ("burstgpt.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
                         "5,ChatGPT,10,3,13,Conversation log\n6.5,GPT-4,20,4,24,API log\n"),
    ],
)  # fmt: skip
def test_public_formats_are_recognised_and_start_at_second_0(write: Write, name: str, text: str) -> None:
    assert rows(WorkloadConfig(path=write(text, name))) == [(0.0, 10, 3), (1.5, 20, 4)]


def test_times_without_a_zone_do_not_follow_the_clock_changes_of_this_machine(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-03-31 01:59:00,10,3\n2024-03-31 03:00:00,20,4\n")
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        found = rows(WorkloadConfig(path=path))
    time.tzset()
    assert [row[0] for row in found] == [0.0, 3660.0]


OURS = "arrival_s,prompt_tokens,output_tokens\n"


def test_a_rate_stretches_recorded_arrivals(write: Write) -> None:
    path = write(OURS + "".join(f"{index},{index},1\n" for index in range(1, 11)))
    assert [row[0] for row in rows(WorkloadConfig(path=path, qps=0.5))] == [2.0 * index for index in range(1, 11)]
    assert [row[0] for row in rows(WorkloadConfig(path=path, time_scale=3.0))] == [3.0 * i for i in range(1, 11)]


def test_lengths_without_arrivals_get_poisson_ones(write: Write) -> None:
    path = write("prompt_tokens,output_tokens\n10,3\n20,4\n")
    drawn = rows(WorkloadConfig(path=path, qps=1.0))
    assert [row[1:] for row in drawn] == [(10, 3), (20, 4)] and 0.0 < drawn[0][0] < drawn[1][0]


def test_a_trace_ends_with_its_duration_or_number_of_requests(write: Write) -> None:
    path = write(OURS + "0,1,1\n1,2,1\n2,3,1\n")
    assert len(rows(WorkloadConfig(path=path, duration_s=2.0))) == 2
    assert len(rows(WorkloadConfig(path=path, num_requests=1))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1.0,zehn,3", "line 3: prompt_tokens=zehn is not a whole number"),
        ("1.0,10.5,3", "line 3: prompt_tokens=10.5 is not a whole number"),
        ("1.0,-4,3", "line 3: prompt_tokens=-4 must be at least 1"),
        ("1.0,10,0", "line 3: output_tokens=0 must be at least 1"),
        ("-1.0,10,3", "line 3: arrival_s=-1.0 lies before the start"),
        ("0.1,10,3", "line 3: arrival_s=0.1 is earlier than the row before it; sort"),
        ("nan,10,3", "line 3: arrival_s=nan is not finite"),
        ("soon,10,3", "line 3: arrival_s=soon is not a number"),
        ("1.0,10", "line 3: 2 values, but the header names 3 columns"),
    ],
)
def test_a_wrong_row_is_refused_with_file_line_and_value(write: Write, row: str, words: str) -> None:
    path = write(f"{OURS}0.5,5,5\n{row}\n")
    message = refusal(WorkloadConfig(path=path))
    assert str(path) in message and words in message and "\n" not in message


def test_rows_without_tokens_can_be_skipped(write: Write) -> None:
    path = write(OURS + "0,5,5\n1,10,0\n2,6,6\n")
    assert "zero_lengths=skip" in refusal(WorkloadConfig(path=path))
    assert rows(WorkloadConfig(path=path, zero_lengths=ZeroLengths.SKIP)) == [(0.0, 5, 5), (2.0, 6, 6)]


def test_a_line_that_is_no_json_is_refused_with_its_number(write: Write) -> None:
    path = write('{"prompt_tokens":1,"output_tokens":1}\n{oops\n', "trace.jsonl")
    assert "line 2: not JSON" in refusal(WorkloadConfig(path=path, qps=1.0))


def test_unknown_columns_are_refused_with_the_names_to_use(write: Write) -> None:
    assert "name them arrival_s" in refusal(WorkloadConfig(path=write("a,b\n1,2\n")))


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [("", "empty.csv", "empty"), (OURS, "none.csv", "no requests in it"), ("x", "trace.parquet", "use .csv or .jsonl")],
)
def test_a_file_without_requests_is_refused(write: Write, text: str, name: str, words: str) -> None:
    assert words in refusal(WorkloadConfig(path=write(text, name)))


def test_a_broken_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.csv.gz"
    path.write_bytes(gzip.compress(OURS.encode() * 1000)[:50])
    assert "cannot be read" in refusal(WorkloadConfig(path=path))


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(WorkloadConfig(path=tmp_path / "nothing.csv"))
    assert "name one file" in refusal(WorkloadConfig(path=tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_requests": 5}, "workload.qps=null"),
        ({"qps": 1.0}, "has no end of its own"),
        ({"qps": 1.0, "num_requests": 5, "arrivals": ArrivalProcess.RECORDED}, "only a trace has recorded arrivals"),
        ({"qps": 1.0, "num_requests": 5, "time_scale": 2.0}, "give workload.qps"),
        ({"qps": 1e-6, "duration_s": 1.0}, "no request arrives"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], words: str) -> None:
    assert words in refusal(WorkloadConfig(**options))


def test_hash_ids_of_a_trace_become_keys_of_its_prompts(write: Write) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,hash_ids\n0,1100,5,1 2 3\n1,1300,5,1 2 4\n2,300,5,9\n3,40,5,8\n"
    workload = Workload(WorkloadConfig(path=write(text)), 0)
    keys = [request.prefix_keys for request in workload.requests(64)]
    assert [len(one) // 16 for one in keys] == [1100 // 64, 1300 // 64, 300 // 64, 0]
    assert keys[0][: 16 * 16] == keys[1][: 16 * 16] and keys[0][16 * 16 :] != keys[1][16 * 16 : 17 * 16]
    assert {request.prefix_keys for request in workload.requests()} == {b""}


def test_ids_of_blocks_of_another_length_are_not_taken_for_those_of_512(write: Write) -> None:
    path = write("arrival_s,prompt_tokens,output_tokens,hash_ids\n0,40,5,1 2 3\n")
    assert "workload.tokens_per_hash_id" in refusal(WorkloadConfig(path=path))
    (request,) = Workload(WorkloadConfig(path=path, tokens_per_hash_id=16), 0).requests(16)
    assert len(request.prefix_keys) == 2 * 16


@pytest.mark.parametrize("ids", ["1 x", "1.5"])
def test_ids_that_are_no_numbers_are_refused(write: Write, ids: str) -> None:
    path = write(f"prompt_tokens,output_tokens,hash_ids\n9,5,{ids}\n")
    assert "hash_ids" in refusal(WorkloadConfig(path=path, qps=1.0))
