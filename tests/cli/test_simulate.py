"""`medha simulate`, `medha explain` and `medha plan` as a person types them, in this process."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.plan import contenders
from megatron_medha.cli.reports.plan_table import interval_text
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.options.compose import compose, freeze, option_names
from megatron_medha.options.plan_options import PlanOptions

Capture = pytest.CaptureFixture[str]

MACHINE = ("hardware=a100_x16", "parallel.tp=8", "parallel.spp=2", "plots=never")
LOONGSERVE = ("simulate", "hardware=a100_x16", "system=loongserve")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A document that arrives first, and questions behind it."""
    path = tmp_path / "trace.csv"
    questions = "".join(f"{0.5 + 0.2 * index},800,5\n" for index in range(8))
    path.write_text(f"arrival_s,prompt_tokens,output_tokens\n0,150000,3\n{questions}")
    return path


TraceOf = Callable[..., tuple[str, str]]


@pytest.fixture
def trace_of(tmp_path: Path) -> TraceOf:
    """The words that name a trace of prompts of these lengths."""

    def write(prompt_lengths: list[int], gap_s: float = 1.0) -> tuple[str, str]:
        path = tmp_path / "prompts.csv"
        rows = "".join(f"{index * gap_s},{length},3\n" for index, length in enumerate(prompt_lengths))
        path.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
        return "workload=trace", f"workload.path={path}"

    return write


@pytest.fixture
def run(trace: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A finished run with its decision log."""
    out = tmp_path / "run"
    assert main(["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", "record=full", f"out={out}"]) == 0
    capsys.readouterr()
    return out


def test_simulate_prints_a_table_by_length_class_and_says_where_the_results_are(
    trace: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "results" / "a"
    words = ["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", f"out={out}"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"9 requests in 2 s, of {trace}, arrivals as recorded: 156,400 prompt tokens" in text
    assert "long p99" in text and "meet the SLO" in text and "MFU" in text
    assert f"results are in {out}" in text
    assert json.loads((out / "summary.json").read_text())["all"]["num_finished"] == 9
    assert main(words) == 2
    assert "not empty; name another" in capsys.readouterr().err


def test_the_synthetic_mix_needs_no_file(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    words = ("workload=medha_mix_00pct", "workload.num_requests=3", "workload.duration_s=null", f"out={out}")
    assert main(["simulate", *MACHINE, *words]) == 0
    assert len((out / "requests.jsonl").read_text().splitlines()) == 3


def test_parquet_has_the_rows_of_the_json_lines_and_a_type_for_every_column(trace: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs megatron_medha[parquet]")
    out = tmp_path / "run"
    words = ["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", "requests=parquet", f"out={out}"]
    assert main(words) == 0
    table = parquet.read_table(out / "requests.parquet")
    assert table.to_pylist() == [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    # Nobody was rejected, and still: tables of several runs must fit together.
    assert str(table.schema.field("why").type) == "string"


def test_parquet_without_pyarrow_is_refused_before_the_run(
    trace: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    out = tmp_path / "run"
    words = ["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", "requests=parquet", f"out={out}"]
    assert main(words) == 2
    assert "pip install 'megatron_medha[parquet]'" in capsys.readouterr().err and not out.exists()


def test_two_runs_of_the_same_options_are_equal_to_the_byte(run: Path, trace: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    main(["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", "record=full", f"out={again}"])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_a_recorded_run_replays(run: Path, capsys: Capture) -> None:
    assert main(["replay", str(run / "decisions.jsonl")]) == 0
    assert "all equal" in capsys.readouterr().out


def test_plots_show_what_the_files_hold(run: Path) -> None:
    pytest.importorskip("matplotlib")
    from megatron_medha.cli.reports.plots import plot_run

    assert [path.name for path in plot_run(run)] == ["ttft_cdf.png", "latency.png", "slack.png", "stages.png"]
    assert all((run / name).stat().st_size > 5_000 for name in ("ttft_cdf.png", "slack.png", "stages.png"))


@pytest.mark.parametrize("option", [name for name in option_names("system") if name != "medha"])
def test_a_baseline_system_leaves_the_same_files_and_deadlines_as_ours(
    option: str, run: Path, trace: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / option
    words = ["simulate", *MACHINE, "workload=trace", f"workload.path={trace}", f"system={option}", f"out={out}"]
    assert main(words) == 0
    assert "8 instances of tp 2" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in run.iterdir()} - {"decisions.jsonl"}
    ours, theirs = (
        {values["request_id"]: values["deadline_s"] for values in map(json.loads, lines.splitlines())}
        for lines in ((run / "requests.jsonl").read_text(), (out / "requests.jsonl").read_text())
    )
    assert ours == theirs
    values = json.loads((out / "summary.json").read_text())
    assert values["all"]["num_finished"] == 9 and 0 < values["machine"]["utilisation"] <= 1 + 1e-9
    spans = [event for event in json.loads((out / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in spans} <= set(range(8)) and len(spans) > 9


def test_explain_says_who_went_before_a_request(run: Path, capsys: Capture) -> None:
    assert main(["explain", str(run), "worst-short"]) == 0
    text = capsys.readouterr().out
    assert "800 prompt tokens" in text and "computed: 800 tokens in" in text
    assert "requests that ran before it:" in text and "r0 " in text and "150,000 prompt tokens" in text
    assert "first token; 5 tokens" in text


def test_explain_says_where_a_prompt_leaves_what_came_before_it(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    words = ("workload=sessions", "workload.sessions.num_sessions=2", "workload.sessions.length_scale=0.05")
    assert main(["simulate", *MACHINE, *words, "workload.sessions.turns=3", "record=full", f"out={out}"]) == 0
    requests = {row["request_id"]: row for row in map(json.loads, (out / "requests.jsonl").read_text().splitlines())}
    first = min(requests.values(), key=lambda row: row["arrival_s"])["request_id"]
    later = max((name for name in requests if name.startswith(first.split(".")[0])), key=lambda name: name[-1])
    capsys.readouterr()
    assert main(["explain", str(out), first]) == 0
    text = capsys.readouterr().out
    assert "prefix cache: 0 of its prompt tokens were there" in text
    assert "no earlier request begins with its first 16 tokens" in text
    assert main(["explain", str(out), later]) == 0
    text = capsys.readouterr().out
    shared, before = re.search(r"its first ([\d,]+) tokens are those of (\S+)\n", text).groups()
    assert before != later and before in requests
    # All of the turn before, its output too, but for the granule that was not full.
    last = max((row for row in requests.values() if row["arrival_s"] < requests[later]["arrival_s"]
                and row["request_id"].split(".")[0] == later.split(".")[0]), key=lambda row: row["arrival_s"])
    num_before = last["prompt_tokens"] + last["tokens_out"]
    assert int(shared.replace(",", "")) == num_before // 16 * 16
    assert f"token {num_before:,}, counted from 0, is the first that its session did not have" in text


def test_explain_says_who_computes_the_prefix_that_a_request_waits_for(tmp_path: Path, capsys: Capture) -> None:
    rows = [
        {"session": "a", "start_s": 0.0, "prompt_tokens": 60000, "output_tokens": 10, "system_tokens": 59000},
        {"session": "b", "start_s": 0.5, "prompt_tokens": 61000, "output_tokens": 10, "system_tokens": 59000},
    ]
    sessions, out = tmp_path / "sessions.jsonl", tmp_path / "run"
    sessions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("workload=sessions", f"workload.path={sessions}", "record=full", f"out={out}")
    assert main(["simulate", *MACHINE, *words]) == 0
    capsys.readouterr()
    assert main(["explain", str(out), "b.0"]) == 0
    text = capsys.readouterr().out
    assert "prefix cache: 58,992 of its prompt tokens were there when it was first scheduled" in text
    assert "its first 58,992 tokens are those of a.0; in 58,992 to 59,007 is the first that is new" in text
    assert "a.0 computes a prefix that it shares" in text


def test_explain_says_when_triage_let_others_go_first(tmp_path: Path, capsys: Capture) -> None:
    crowd, out = tmp_path / "crowd.csv", tmp_path / "run"
    crowd.write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,400000,2\n" * 4)
    assert main(["simulate", *MACHINE, "workload=trace", f"workload.path={crowd}", "record=full", f"out={out}"]) == 0
    capsys.readouterr()
    assert main(["explain", str(out), "worst-long"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = [index for index, line in enumerate(lines) if "its deadline can no longer be met" in line]
    # It has lost when its slack is used up; what happened from then on is kept apart from what was before.
    assert lines[place + 1].split()[0] == lines[place].split()[0]
    assert -0.1 < float(lines[place + 1].split()[2]) <= 0.0


def test_explain_names_what_is_missing(run: Path, trace: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["explain", str(run), "r99"]) == 2
    assert "r99: no such request" in capsys.readouterr().err
    assert main(["explain", str(run), "worst-medium"]) == 2
    assert "has no request of that class; it has worst-long and worst-short" in capsys.readouterr().err
    (run / "decisions.jsonl").unlink()
    assert main(["explain", str(run), "r1"]) == 2
    assert "run it again with record=full" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "nowhere"), "r1"]) == 2
    assert "no run of medha simulate" in capsys.readouterr().err
    assert main(["explain", str(run)]) == 2


def test_explain_refuses_a_log_that_was_changed(run: Path, capsys: Capture) -> None:
    log = run / "decisions.jsonl"
    lines = log.read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if '"batch":' in line)
    lines[place] = lines[place].replace('"predicted_s":', '"predicted_s":1')
    log.write_text("\n".join(lines) + "\n")
    assert main(["explain", str(run), "r8"]) == 1
    assert f"line {place + 1}: recorded" in capsys.readouterr().err


SMALL_PLAN = ("plan", "hardware=a100_x8", "hardware.num_devices=2", "max_kvp=1", "num_processes=1")
CHATS = ("workload=medha_mix_00pct", "workload.qps=1.5", "workload.output_scale=0.02", "trial_s=20")
LONG_FROM_10K = ("classes.short_below=10000", "classes.long_above=10000")


def test_plan_finds_the_fewest_gpus(capsys: Capture) -> None:
    assert main([*SMALL_PLAN, *CHATS]) == 0
    text = capsys.readouterr().out
    assert "1 GPU of a100_x8: parallel.tp=1 parallel.spp=1" in text and "95% confidence" in text
    assert re.search(r"each is given the same \d\d s of the workload: \d\d short requests", text)
    assert main([*SMALL_PLAN, *CHATS, "slo.e2e_s=1e-3"]) == 1
    assert "none of" in capsys.readouterr().out


def test_a_plan_shows_every_class_and_may_ask_the_slo_of_each(trace_of: TraceOf, capsys: Capture) -> None:
    load = trace_of([20_000] * 20 + [800] * 300, gap_s=2.5)
    words = (*SMALL_PLAN, "max_dp=1", *load, *LONG_FROM_10K, "slo.ttft_s=0.5")
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "220 short and 20 long requests" in text
    assert "(short 100.0%, long 0.0%) meet the SLO; 90% of all requests must" in text
    assert "each_class=true asks it of every class" in text
    assert main([*words, "each_class=true"]) == 1
    text = capsys.readouterr().out
    assert "no layout of 2 GPUs" in text and "20 of 20 long requests are late even alone: 20,000 tokens take" in text


def test_a_plan_names_the_bound_that_no_layout_can_beat_before_it_searches(trace_of: TraceOf, capsys: Capture) -> None:
    load = trace_of([500] * 280 + [20_000] * 20)
    assert main([*SMALL_PLAN, *load, *LONG_FROM_10K, "slo.ttft_s=0.2", "slo.attainment=0.99"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"a lone prompt of 20,000 tokens, the longest, takes \d+\.\d\d s on the best layout", text)
    assert "however small the load" in text and "GPUs  tp" not in text


def test_replicas_do_not_make_a_plan_pass_over_what_comes_late(trace_of: TraceOf, capsys: Capture) -> None:
    """A candidate of two replicas was tried on the first half of a trace, where there are no long prompts."""
    load = trace_of([500] * 120 + [20_000, *[500] * 4] * 25, gap_s=0.15)
    assert main([*SMALL_PLAN, *load, *LONG_FROM_10K, "slo.ttft_s=4", "each_class=true"]) == 1
    text = capsys.readouterr().out
    two_replicas = [line for line in text.splitlines() if line.split()[:5] == ["2", "1", "1", "1", "2"]]
    assert len(two_replicas) == 1 and "long requests" in two_replicas[0]


@pytest.mark.parametrize(
    ("lengths", "more", "reason"),
    [
        ([500] * 300 + [120_000] * 14, (), "14 are long"),
        ([500] * 90, ("slo.attainment=0.99",), "slo.attainment=0.99, which needs 100"),
        ([500] * 300, ("trial_s=3",), "trial_s=null takes as many as it needs"),
    ],
)
def test_a_plan_cannot_say_what_too_few_requests_do_not_show(
    trace_of: TraceOf, lengths: list[int], more: tuple[str, ...], reason: str, capsys: Capture
) -> None:
    assert main([*SMALL_PLAN, *trace_of(lengths), *more]) == 1
    text = capsys.readouterr().out
    assert "cannot say which layout meets the SLO" in text and reason in text


def test_a_plan_for_a_trace_takes_its_own_rate(trace_of: TraceOf, capsys: Capture) -> None:
    words = (*SMALL_PLAN, "max_dp=2", "gpu_usd_per_h=3.6")
    assert main([*words, *trace_of([500] * 100, gap_s=0.5)]) == 0
    assert "1 GPU of a100_x8" in capsys.readouterr().out


def test_plan_finds_the_load_that_a_cluster_carries(capsys: Capture) -> None:
    assert main([*SMALL_PLAN, "find=capacity", *CHATS, "workload.qps=2", "trial_s=12", "resolution=1"]) == 0
    assert "requests/s on 2 GPUs of a100_x8" in capsys.readouterr().out


def test_a_trace_is_not_speeded_up_until_it_lasts_seconds(trace_of: TraceOf, capsys: Capture) -> None:
    words = (*SMALL_PLAN, "find=capacity", "max_dp=1", *trace_of([200] * 240), "workload.qps=2", "resolution=1")
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "4.000 requests/s on" in text and "It may carry more" in text and "take a longer trace" in text


def test_plan_says_what_every_system_needs_and_what_that_costs(capsys: Capture) -> None:
    # An instance of loongserve has two GPUs; one GPU is enough for ours.
    words = ("workload.qps=1", "trial_s=null", "gpu_usd_per_h=3.6", "workload.num_requests=20")
    assert main([*SMALL_PLAN, *CHATS, *words, "systems=[medha,loongserve]", "schedulers=[lars,vllm_chunk_512]"]) == 0
    text = capsys.readouterr().out
    at_best = [line.split() for line in text.partition("at best:")[2].splitlines() if line.strip()]
    costs = {row[5]: (row[0], row[-2], row[-1]) for row in at_best[1:4]}
    one, two = ("1", "3.60", "1.000"), ("2", "7.20", "2.000")
    assert costs == {"lars": one, "vllm_chunk_512": one, "loongserve": two}
    assert "1.00 s of GPU time per request; $3.60 an hour, $1.000 per 1,000 requests" in text


def test_a_scheduler_that_is_tried_is_the_option_of_that_name_with_the_overrides_on_top() -> None:
    overrides = ["scheduler=fcfs", "scheduler.step_budget_s=0.07", "schedulers=[lars,vllm_chunk_512]"]
    options = freeze(compose("plan", PlanOptions, overrides), PlanOptions)
    lars, vllm = contenders(options, overrides, None)
    assert (lars.name, lars.scheduler.policy, lars.scheduler.step_budget_s) == ("lars", "lars", 0.07)
    assert (vllm.name, vllm.scheduler.step_budget_s) == ("vllm_chunk_512", 0.07)
    assert vllm.scheduler.chunking is Chunking.FIXED


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("simulate", "parallel.tp=7"), "parallel.tp=7 must divide model.num_heads=32"),
        (("simulate", "hardware=a100_x8"), "take a larger cluster"),
        (("simulate", "model=llama3_70b", "hardware=a100", "parallel=single"), "does not fit"),
        (("simulate", "model=auto"), "use model=llama3_8b"),
        (("simulate", "parallel.dp=2"), "simulate one of them with its share of the load"),
        (("simulate", "workload=trace"), "name a trace, workload.path=FILE"),
        (("simulate", "workload.path=/nowhere.csv"), "no such file"),
        (("simulate", "workload.qps=-1"), "workload.qps=-1: must be between"),
        (("simulate", "truth.noise=9"), "truth.noise=9: must be between"),
        (("simulate", "slo.ttft=1"), "did you mean slo.ttft_s?"),
        ((*LOONGSERVE, "system.instance_tp=3"), "system.instance_tp=3 must divide the 16 GPUs"),
        ((*LOONGSERVE, "system.instance_tp=16"), "does not leave its node"),
        ((*LOONGSERVE, "system.num_reserved=8"), "one at least must be left for long prompts"),
        ((*LOONGSERVE, "parallel.max_tokens_per_shard=4096"), "leave it null"),
        ((*LOONGSERVE, "truth=noisy"), "use truth=exact, or system=medha"),
        ((*LOONGSERVE, "belief=online"), "use belief=exact"),
        ((*LOONGSERVE, "record=full"), "use record=standard"),
        ((*LOONGSERVE, "system.instance_tp=1", "model=llama3_70b"), "does not fit"),
        (("simulate", "system=static_cp", "system.num_reserved=1"), "scheduler.reserved_share"),
        (("plan", "hardware=a100"), "take a cluster, like hardware=a100_x16"),
        (("plan", "schedulers=[fastest]"), "scheduler=fastest"),
        (("plan", "systems=[fastest]"), "system=fastest"),
        (("plan", "schedulers=[lars,lars]"), "name each one once"),
        (("plan", "gpu_usd_per_h=-1"), "gpu_usd_per_h=-1: must be between"),
        (("plan", "hardware=a100_x8", "model=llama3_405b"), "no layout can serve this workload"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: tuple[str, ...], way_out: str, capsys: Capture) -> None:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert way_out in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["simulate", "explain", "plan"])
def test_every_command_has_help_with_an_example(name: str, capsys: Capture) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: medha {name}" in text and f"  medha {name}" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_shows_each_key_once_and_as_it_is_in_force(capsys: Capture) -> None:
    main(["simulate", "--help=all"])
    text = capsys.readouterr().out
    assert "model.kv_memory_gib=null" in text and "kv_memory_gib=48" not in text
    assert text.count("model.kv_memory_gib=") == 1


def test_simulate_and_serve_list_only_the_targets_that_fit_them(capsys: Capture) -> None:
    main(["simulate", "--help=all"])
    simulated = capsys.readouterr().out
    main(["serve", "--help=all"])
    served = capsys.readouterr().out
    assert "slo.ttft_multiplier=" in simulated and "default_class" not in simulated
    assert "slo_classes.default_class=" in served and "ttft_multiplier" not in served


@pytest.mark.parametrize(
    ("each_class", "said"), [(False, "1,000 requests: 98.7% to 99.7%"), (True, "29 long requests: 82.8% to 99.4%")]
)
def test_the_confidence_interval_of_a_plan_is_of_the_share_that_is_asked_for(each_class: bool, said: str) -> None:
    trial = SimpleNamespace(each_class=each_class)
    verdict = SimpleNamespace(trial=trial, attainment=0.994, attainment_by_class={"short": 0.995, "long": 28 / 29})
    assert interval_text(verdict, {"short": 971, "long": 29}) == f"95% confidence interval, from {said}"  # type: ignore[arg-type]
