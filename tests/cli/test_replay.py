"""`medha replay` on logs that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.core.batch import Arrived
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.stats.decision_log import DecisionLog

SETUP = SchedulerSetup(
    config=SchedulerConfig(),
    shape=ModelShape(
        name="test", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=100, max_context_len=1024,
    ),
    hardware=Hardware(name="test", flops_per_s=1e12, memory_bytes_per_s=1e11),
    layout=ParallelLayout(),
    num_blocks=100,
    block_size=16,
)  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """One request arrives, and its first batch is formed."""
    path = tmp_path / "log.jsonl"
    recorder = DecisionLog.open(path, SETUP.header())
    scheduler = SETUP.build()
    event = Arrived(Request(request_id="a", num_prompt_tokens=100, max_output_tokens=5, arrival_s=1.0))
    recorder.handled(event, scheduler.handle(event, 1.0), 1.0)
    batch = scheduler.schedule(1.0)
    assert batch is not None
    recorder.scheduled(batch, 1.0)
    return path


def test_a_log_that_replays_is_counted(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log)]) == 0
    assert "1 batches, all equal" in capsys.readouterr().out


def test_a_decision_that_differs_is_shown_with_its_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines()
    record = json.loads(lines[2])
    record["batch"]["chunks"][0][2] = 50
    log.write_text("\n".join([*lines[:2], json.dumps(record)]))
    assert main(["replay", str(log)]) == 1
    assert "line 3: recorded" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"header": {}}', '{"header": 5}', "[1]"])
def test_a_file_that_is_no_decision_log_is_refused_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    assert main(["replay", str(path)]) in (1, 2)
    assert capsys.readouterr().err.startswith("medha replay: ")


def test_a_file_that_is_binary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["replay", str(path)]) == 1
    assert capsys.readouterr().err.startswith("medha replay: ")


def test_a_log_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "nowhere")]) == 2
    assert "cannot be read" in capsys.readouterr().err
