"""A run can be recorded, replayed to the same batches, and told from a run that was different."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.lib.recording_runtime import RecordingSimRuntime
from megatron_medha.core.batch import Arrived, Batch, Completed
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.stats.decision_log import DecisionLog, ReplayError, read_log, replay

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip


def setup_of(spp: int = 1, num_blocks: int = 60, **config: Any) -> SchedulerSetup:
    return SchedulerSetup(
        config=SchedulerConfig(**config),
        shape=SHAPE,
        hardware=Hardware(name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4),
        layout=ParallelLayout(spp=spp),
        num_blocks=num_blocks,
        block_size=4,
    )


def record(setup: SchedulerSetup, seed: int, num_requests: int = 25) -> list[str]:
    """The log of a run with noise, stops, failures, aborts and a loss of the ranks."""
    draw = random.Random(seed)
    requests = [
        Request(
            request_id=f"r{index}",
            num_prompt_tokens=draw.choice([3, 10, 50, 150]),
            max_output_tokens=draw.randint(1, 30),
            arrival_s=draw.uniform(0.0, 0.5),
            ttft_slo_s=draw.choice([None, 0.01, 5.0]),
            priority=draw.choice([0, 0, 1]),
            prefix_keys=draw.randbytes(16 * draw.choice([0, 1, 10])),
            session_id=draw.choice(["", "s"]),
        )
        for index in range(num_requests)
    ]

    def outcome(batch: Batch, duration_s: float) -> Completed:
        ids = [chunk.request_id for chunk in batch.chunks]
        return Completed(
            batch_id=batch.batch_id,
            duration_s=duration_s,
            stopped=tuple(name for name in ids if draw.random() < 0.02),
            failed=tuple((name, "injected") for name in ids if draw.random() < 0.01),
        )

    world = RecordingSimRuntime(
        requests, lambda batch: batch.predicted_s * draw.uniform(0.7, 1.5), setup.layout.spp, outcome
    )
    world.abort(0.2, "r1")
    world.lose_ranks(0.3)
    stream = io.StringIO()
    serve(setup.build(), world, (DecisionLog(stream, setup.header()),))
    return stream.getvalue().splitlines()


def replayed(lines: list[str]) -> int:
    header, records = read_log(lines)
    return replay(records, SchedulerSetup.from_header(header).build())


def num_batches(lines: list[str]) -> int:
    return sum('"batch":' in line for line in lines)


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    chunking=st.sampled_from(list(Chunking)),
    spp=st.integers(1, 3),
    progress_share=st.sampled_from([0.0, 0.1, 0.5]),
    num_blocks=st.sampled_from([60, 200]),
    max_num_sequences=st.sampled_from([2, 16]),
    seed=st.integers(0, 99),
)
def test_a_recorded_run_replays_to_the_same_batches(
    policy: str, chunking: Chunking, spp: int, progress_share: float, num_blocks: int, max_num_sequences: int, seed: int
) -> None:
    setup = setup_of(
        spp,
        num_blocks,
        policy=policy,
        chunking=chunking,
        step_budget_s=0.005,
        tile_tokens=8,
        progress_share=progress_share,
        max_num_sequences=max_num_sequences,
    )
    lines = record(setup, seed)
    assert replayed(lines) == num_batches(lines) > 0


def test_a_log_that_says_nothing_of_the_prefix_cache_is_of_a_scheduler_without_one() -> None:
    setup = replace(setup_of(), kv=KVConfig(granule_tokens=8))
    header = setup.header()
    assert SchedulerSetup.from_header(header) == setup
    del header["kv"]
    assert SchedulerSetup.from_header(header).kv == KVConfig(prefix_cache=False)


LINES = record(setup_of(), seed=0)


def first_line(fragment: str) -> int:
    """Index of the first line with this fragment."""
    return next(index for index, line in enumerate(LINES) if fragment in line)


def test_the_header_says_all_a_replay_needs() -> None:
    header, _ = read_log(LINES)
    assert SchedulerSetup.from_header(header) == setup_of()


def test_the_header_names_the_granule_because_its_default_may_change() -> None:
    assert replace(setup_of(), kv=KVConfig()).header()["kv"]["granule_tokens"] == 16


def test_a_log_that_leaves_the_granule_to_a_default_means_the_default_of_its_time() -> None:
    opening = json.loads(LINES[0])
    opening["header"]["kv"] |= {"prefix_cache": True, "granule_tokens": None}
    header, _ = read_log([json.dumps(opening), *LINES[1:]])
    assert SchedulerSetup.from_header(header).kv.granule_tokens == 64


@pytest.mark.parametrize("change", ["budget_s", "predicted_s", "created_s", "batch_id"])
def test_a_changed_number_of_a_batch_is_found_and_its_line_named(change: str) -> None:
    index = first_line('"batch":')
    tampered = json.loads(LINES[index])
    tampered["batch"][change] += 1
    with pytest.raises(ReplayError, match=f"^line {index + 1}: "):
        replayed([*LINES[:index], json.dumps(tampered), *LINES[index + 1 :]])


def test_a_changed_chunk_is_found_and_its_line_named() -> None:
    index = first_line('"batch":')
    tampered = json.loads(LINES[index])
    tampered["batch"]["chunks"][0][2] += 1
    with pytest.raises(ReplayError, match=f"^line {index + 1}: "):
        replayed([*LINES[:index], json.dumps(tampered), *LINES[index + 1 :]])


def test_a_changed_block_is_found_and_its_line_named() -> None:
    index = first_line('"append"')
    tampered = json.loads(LINES[index])
    tampered["batch"]["kv_ops"][0][4][0][0] += 1
    with pytest.raises(ReplayError, match=f"^line {index + 1}: "):
        replayed([*LINES[:index], json.dumps(tampered), *LINES[index + 1 :]])


def test_a_changed_input_is_found_at_the_first_batch_that_it_changes() -> None:
    index = first_line('"event":"Arrived"')
    tampered = json.loads(LINES[index])
    tampered["request"]["num_prompt_tokens"] += 1
    with pytest.raises(ReplayError, match=r"^line \d+: "):
        replayed([*LINES[:index], json.dumps(tampered), *LINES[index + 1 :]])


def test_a_missing_batch_is_found() -> None:
    index = first_line('"batch":')
    with pytest.raises(ReplayError, match=r"^line \d+: "):
        replayed([*LINES[:index], *LINES[index + 1 :]])


def test_a_missing_event_is_found() -> None:
    index = first_line('"event":"Completed"')
    with pytest.raises(ReplayError, match=r"^line \d+: "):
        replayed([*LINES[:index], *LINES[index + 1 :]])


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (['{"now_s": 1.0, "event": "Arr'], 2),
        (['["no object"]'], 2),
        (['{"now_s": 1.0, "event": "Departed"}'], 2),
        (['{"event": "RanksLost", "why": "no time"}'], 2),
        (['{"now_s": 1.0, "event": "Aborted"}'], 2),
        (['{"now_s": 1.0, "batch": {"chunks": [[1, 2]]}}'], 2),
        (['{"now_s": 1.0, "batch": 7}'], 2),
    ],
)
def test_a_line_that_is_no_record_is_named(bad: list[str], line: int) -> None:
    with pytest.raises(ReplayError, match=f"^line {line}: "):
        replayed([LINES[0], *bad])


@pytest.mark.parametrize("lines", [[], ["{}"], ["not json"], ['{"header": 3}']])
def test_a_log_without_a_header_is_refused(lines: list[str]) -> None:
    with pytest.raises(ReplayError, match="empty|^line 1: "):
        read_log(lines)


def test_a_log_cut_off_by_a_crash_replays_up_to_the_cut() -> None:
    index = first_line('"event":"Completed"') + 5
    header, records = read_log([*LINES[:index], LINES[index][:20]])
    with pytest.raises(ReplayError, match=f"^line {index + 1}: "):
        replay(records, SchedulerSetup.from_header(header).build())


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "decisions.jsonl"
    log = DecisionLog.open(path, {"made": "here"})
    event = Arrived(Request(request_id="a", num_prompt_tokens=1, max_output_tokens=1, arrival_s=0.1))
    log.handled(event, [], 0.1)
    header, records = read_log(path.read_text().splitlines())
    assert header == {"made": "here"} and [record.entry for record in records] == [event]


def test_a_log_of_a_scheduler_with_an_unknown_option_is_refused() -> None:
    header = setup_of().header()
    header["config"] |= {"max_bankd_steps": 3}
    with pytest.raises(ConfigError, match="options that this version lacks: max_bankd_steps"):
        SchedulerSetup.from_header(header)


def test_keys_of_the_first_format_are_translated() -> None:
    header = setup_of().header()
    del header["config"]["max_banked_steps"]
    header["config"] |= {"max_saved_gift_steps": 3.0, "long_prefill_tokens": 8}
    found, _ = read_log([json.dumps({"format": 1, "header": header})])
    assert SchedulerSetup.from_header(found).config.max_banked_steps == 3.0
