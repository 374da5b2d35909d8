"""-m: a job per combination, started again where it was left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts.job_words import JobWords
from megatron_medha.cli.reports.report_runs import differing_keys, find_runs
from megatron_medha.system.origin import source_commit

SMALL = ["parallel.spp=1", "workload.duration_s=5", "plots=never", "record.trace_duration_s=0"]


def sweep(out: Path, *words: str) -> int:
    return main(["simulate", "-m", *SMALL, f"out={out}", *words])


def test_a_sweep_has_a_run_directory_per_combination_and_goes_on_where_it_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "scheduler=fcfs,lars", "workload.qps=1,2") == 0
    first = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/summary.json")}
    assert sorted(first) == ["0", "1", "2", "3"]
    assert "scheduler=lars\n" in (tmp_path / "2" / "overrides.txt").read_text()
    for path in (tmp_path / "1").iterdir():
        path.unlink()                                    # as if interrupted before it had begun, ...
    (tmp_path / "3" / "summary.json").unlink()           # ... and before it had ended
    capsys.readouterr()

    assert sweep(tmp_path, "scheduler=fcfs,lars", "workload.qps=1,2") == 0

    printed = capsys.readouterr().out
    assert [f"job {job}: already done" in printed for job in range(4)] == [True, False, True, False]
    assert {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/summary.json")} == first


def test_a_run_says_where_it_comes_from_and_its_name_is_what_differs_in_the_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path, "scheduler=fcfs,lars", "seed=1") == 0

    facts = [json.loads((tmp_path / str(job) / "run.json").read_text()) for job in range(2)]
    commands = [one["command"] for one in facts]
    assert commands[1].startswith("medha simulate parallel.spp=1 workload.duration_s=5 plots=never ")
    assert "scheduler=lars" in commands[1] and "out=" not in commands[1]
    assert facts[0]["commit"] == facts[1]["commit"] == source_commit()
    assert facts[0]["machine"]["num_cores"] >= 1 and facts[0]["machine"]["cpu"]
    words = shlex.split(commands[1])[2:]
    assert JobWords.of("simulate", words, ("scheduler",)).name == "scheduler=lars"


def test_no_secret_is_in_the_command_of_a_run() -> None:
    typed = JobWords.of("bench", ["url=http://h:1", "api_key=sk-verysecret", "workload.qps=2", "out=x"])
    assert "verysecret" not in typed.command and "workload.qps=2" in typed.command
    assert typed.name == "url=http://h:1, qps=2"


def test_a_sweep_that_was_killed_goes_on_and_comes_to_what_it_would_have_come_to(
    tmp_path: Path, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("scheduler=fcfs,lars,srpt",)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    medha = start("simulate", "-m", *SMALL, f"out={killed}", *words, python_flags=("-u",))
    medha.line_with("job 1: ")
    medha.process.kill()
    medha.end()
    assert (killed / "0" / "summary.json").exists() and not (killed / "2" / "summary.json").exists()

    assert sweep(killed, *words) == 0

    printed = capsys.readouterr().out
    assert "job 0: already done" in printed and "job 2: already done" not in printed
    assert sweep(undisturbed, *words) == 0
    for job in "012":
        name = f"{job}/summary.json"
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_load_starts_the_server_that_it_names_and_a_report_compares_it_by_the_servers_options(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = f"runtime=sim model=llama3_8b hardware=h100 tokenizer={tokenizer_dir}"
    serve = f"serve='{server} scheduler=fcfs'"
    small = ("workload.num_requests=3", "workload.qps=20", "workload.long_share=0", "idle=skip", "slo.ttft_s=1")
    words = ("highest_token=2", "lowest_token=0", "exclude_share=0", "plots=never", f"out={tmp_path / 'load'}")
    assert main(["bench", "-m", serve, *small, *words]) == 0
    assert sweep(tmp_path / "simulated", "scheduler=lars", "workload.qps=1") == 0

    measured, simulated = find_runs([tmp_path / "load", tmp_path / "simulated"])

    assert measured.values["all"]["num_finished"] == 3
    assert (measured.options["scheduler.policy"], simulated.options["scheduler.policy"]) == ("fcfs", "lars")
    assert "scheduler.policy" in differing_keys([measured, simulated])
    assert not measured.is_simulated


def test_a_server_that_does_not_come_up_fails_its_job_with_what_it_said(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", f"serve='checkpoint={tokenizer_dir}'", f"out={tmp_path / 'load'}"]) == 1

    assert "the server of this run ended with code" in capsys.readouterr().err


def test_another_sweep_into_the_same_directory_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert sweep(out, "workload.qps=1,2") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()

    assert sweep(out, "workload.qps=3") == 2

    error = capsys.readouterr().err
    assert "holds another sweep" in error and "workload.qps=1,2" in error and "name another directory" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_sweep_into_a_directory_of_other_things_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert sweep(tmp_path, "workload.qps=1") == 2
    assert "not empty" in capsys.readouterr().err and (tmp_path / "thesis.tex").read_text() == "mine"


def test_words_that_change_no_result_go_on_with_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "workload.qps=1,2") == 0
    capsys.readouterr()
    assert sweep(tmp_path, "workload.qps=1,2", "objective=all.tokens_per_s", "hydra.verbose=false") == 0
    assert capsys.readouterr().out.count("already done") == 2


def test_a_sweep_is_shown_job_by_job_and_none_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    assert sweep(out, "scheduler=fcfs,lars", "--cfg", "job", "--resolve") == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [one["scheduler"]["policy"] for one in documents] == ["fcfs", "lars"]
    assert not out.exists()


def test_a_sweep_may_be_over_all_options_of_a_group_that_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "-m", *SMALL, "scheduler=glob(lars*)", "--cfg", "job"]) == 0
    assert capsys.readouterr().out.count("# job") == 4


def test_a_sweep_whose_values_depend_on_results_cannot_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "-m", "--cfg", "job", "hydra/sweeper=optuna"]) == 2
    assert "hydra/sweeper=optuna with --cfg" in capsys.readouterr().err


def test_a_job_that_fails_says_why_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "parallel.kvp=1,0", "workload.qps=1") == 1

    assert "job 1 failed: " in (error := capsys.readouterr().err)
    assert "parallel.kvp=0 must be at least 1" in error
    assert json.loads((tmp_path / "0" / "summary.json").read_text())["all"]["num_requests"] > 0


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("scheduler=fcfs,larz", "scheduler=larz: unknown option; did you mean lars?"),
        ("scheduler.policyy=fcfs,lars", "did you mean scheduler.policy?"),
    ],
)
def test_a_sweep_over_what_does_not_exist_is_refused_before_any_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, why: str
) -> None:
    assert sweep(tmp_path, word) == 2

    assert why in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.yaml"))
    assert sweep(tmp_path, "workload.qps=1") == 0, "the words are corrected, and there is nothing to go on with"


def test_an_objective_that_is_not_in_the_summary_names_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "objective=all.godput", "workload.qps=1") == 1

    assert "objective=all.godput: no such figure" in capsys.readouterr().err

    # The run itself is as good as any: with a figure that is there it is not run again.
    assert sweep(tmp_path, "objective=all.goodput_per_s", "workload.qps=1") == 0
    assert "job 0: already done" in capsys.readouterr().out


def test_a_sweep_whose_jobs_would_be_numbered_otherwise_is_another_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, "scheduler=fcfs,lars", "workload.qps=1,2") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sweep(tmp_path, "workload.qps=1,2", "scheduler=fcfs,lars") == 2
    assert "holds another sweep (scheduler=fcfs,lars workload.qps=1,2" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    assert main(["simulate", "-m", "scheduler=fcfs, lars", *SMALL[::-1], "workload.qps=1,2", f"out={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("already done") == 4


def test_a_directory_may_be_quoted_as_elsewhere(tmp_path: Path) -> None:
    assert main(["simulate", "-m", *SMALL, "scheduler=fcfs", f'out="{tmp_path}/two words, a comma"']) == 0
    assert (tmp_path / "two words, a comma" / "0" / "summary.json").exists()


def test_a_key_is_in_no_file_of_a_sweep(tmp_path: Path) -> None:
    url = "url=http://127.0.0.1:1"
    assert main(["bench", "-m", "api_key=sk-not-for-files", url, "workload.qps=1,2", f"out={tmp_path}"]) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "not-for-files" in path.read_text()] == []
    assert (tmp_path / "0" / "error.txt").exists()


def test_a_job_that_ended_with_other_options_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "workload.qps=1,2") == 0
    config = tmp_path / "0" / "config.yaml"  # as of a sweeper that chooses other values each time
    config.write_text(config.read_text().replace("step_budget_s: 0.0", "step_budget_s: 0.1", 1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sweep(tmp_path, "workload.qps=1,2") == 2
    assert "job 0 there has ended with other options; name another directory" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
