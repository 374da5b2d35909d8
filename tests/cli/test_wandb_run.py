"""What `medha simulate tracking=wandb` leaves for W&B, and the sweep that W&B runs over it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_medha.cli.medha import main
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from tests.cli.conftest import Start
from tests.cli.wandb_file import WandbFile

Words = tuple[str, ...]

pytest.importorskip("wandb", reason="wandb is not installed: pip install 'megatron_medha[tracking]'")

SWEEP = Path(__file__).parents[2] / "experiments" / "wandb_sweep" / "sweep.yaml"
SMALL = ("parallel.spp=1", "workload.duration_s=5", "record.trace_duration_s=0", "plots=never", "seed=3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wandb") / "run"
    words = ("tracking=wandb", "tracking.wandb_mode=offline", "tracking.wandb_group=mine", f"out={out}",
             "tracking.wandb_tags=[night,a100]")  # fmt: skip
    assert main(["simulate", *SMALL, *words]) == 0
    return out


@pytest.fixture(scope="module")
def written(directory: Path) -> WandbFile:
    (path,) = (directory / "wandb").glob("offline-run-*/run-*.wandb")
    return WandbFile(path)


def test_the_config_of_the_run_is_what_was_composed(written: WandbFile, directory: Path) -> None:
    composed = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    assert isinstance(composed, dict)
    assert {key: written.config[key] for key in composed} == composed
    assert written.config["seed"] == 3 and written.config["parallel"]["tp"] == 8


def test_a_run_is_called_by_what_was_typed_and_has_its_tags_and_its_commit(
    written: WandbFile, directory: Path
) -> None:
    assert written.name == "spp=1, duration_s=5, trace_duration_s=0, seed=3"
    assert written.tags == ["night", "a100"]
    assert written.config["commit"] == json.loads((directory / "run.json").read_text())["commit"]


def test_the_history_is_the_samples_over_simulated_time(written: WandbFile, directory: Path) -> None:
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    found = [row for row in written.history if "num_waiting" in row]
    assert [row["time_s"] for row in found] == pytest.approx([sample["now_s"] for sample in samples], abs=1e-5)
    assert [row["num_ended"] for row in found] == [sample["num_ended"] for sample in samples]
    assert [row["num_waiting"] for row in found] == [len(sample["waiting"]) for sample in samples]


def test_the_summary_holds_every_figure_by_its_path(written: WandbFile, directory: Path) -> None:
    values = json.loads((directory / "summary.json").read_text())
    assert written.summary["all.goodput_per_s"] == pytest.approx(values["all"]["goodput_per_s"])
    assert written.summary["classes.short.ttft_s.p99"] == pytest.approx(values["classes"]["short"]["ttft_s"]["p99"])
    assert written.summary["machine.num_gpus"] == 8


def test_requests_are_a_table_and_the_directory_is_an_artifact(written: WandbFile, directory: Path) -> None:
    (path,) = (directory / "wandb").glob("offline-run-*/files/media/table/requests_*.table.json")
    table = json.loads(path.read_text())
    requests = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == requests
    (names,) = (names for _, kind, names in written.artifacts if kind == "run-directory")
    assert {"config.yaml", "run.json", "summary.json", "summary.txt", "requests.jsonl", "samples.jsonl"} == set(names)


def test_a_server_keeps_its_samples_and_its_decision_log(start: Start, simulated: Words, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    words = ("tracking=wandb", "tracking.wandb_mode=offline", "tracking.wandb_group=mine", "tracking.interval_s=1000")
    medha = start(*simulated, *words, f"tracking.decision_log={log}")
    medha.line_with("ready after")
    medha.process.send_signal(signal.SIGINT)
    assert medha.end() == 0
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = WandbFile(path)
    assert written.config["scheduler"]["policy"] == "lars" and written.exit_codes == [0]
    assert [row["num_waiting"] for row in written.history] == [0]
    assert [(kind, names) for _, kind, names in written.artifacts] == [("server-logs", ["decisions.jsonl"])]


def test_the_run_has_ended_well(written: WandbFile) -> None:
    assert written.exit_codes == [0]


def test_what_the_agent_of_the_sweep_types_is_a_simulation() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = OmegaConf.to_container(OmegaConf.load(SWEEP), resolve=False)
    assert isinstance(sweep, dict)
    chosen = {"scheduler.step_budget_s": 0.021, "scheduler.slack_margin_steps": 4, "scheduler.policy": "hrrn"}
    assert set(chosen) == set(sweep["parameters"])
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        if word == "${args_no_hyphens}":
            words += arguments["args_no_hyphens"]
        else:
            words.append(word.replace("${program}", sweep["program"]))
    assert words[:2] == ["medha", "simulate"]
    options = freeze(compose("simulate", SimulateOptions, words[2:]), SimulateOptions)
    assert simulation_config(options).setup.layout.world_size == 16
    assert options.tracking.wandb_project == sweep["project"]
    assert options.scheduler.step_budget_s == 0.021 and options.scheduler.policy == "hrrn"
