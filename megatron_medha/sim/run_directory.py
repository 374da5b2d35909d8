"""What a simulation leaves behind: one directory that says what ran, and everything that came out of it.

    config.yaml       every option, as composed
    run.json          versions, seed, commit, command and machine
    requests.jsonl    one line per request, in the order in which they ended
    samples.jsonl     the state of the replica every few seconds: queue, slack, KV
    summary.json      all figures; summary.txt: the table
    trace.json        chunks on stages, for https://ui.perfetto.dev
    decisions.jsonl   every input and decision of the scheduler, if asked for

Nothing in these files depends on the clock, and only run.json on the machine: the same options give the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_medha.core.errors import ConfigError, check_ranges
from megatron_medha.sim.simulation import SimulationConfig, SimulationHooks, StateSample
from megatron_medha.stats.decision_log import DecisionLog
from megatron_medha.stats.request_stats import RequestStats
from megatron_medha.stats.slo_targets import Slo
from megatron_medha.stats.summary import LengthClasses
from megatron_medha.stats.timeline import Timeline

CONFIG, RUN, REQUESTS, SAMPLES = "config.yaml", "run.json", "requests.jsonl", "samples.jsonl"
SUMMARY, TABLE, TRACE, DECISIONS = "summary.json", "summary.txt", "trace.json", "decisions.jsonl"

_LATENCIES = (
    "ttft_s", "tpot_s", "max_tbt_s", "e2e_s", "scheduling_delay_s", "execution_s", "preempted_s", "isolated_s",
    "slowdown", "deadline_miss_rate",
)  # fmt: skip
_BUILT_UP = 0.1  # of the arrivals' time: what a load needs to build up, as medha bench leaves it out


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What a run writes down beside its summary."""

    decision_log: bool = False
    trace_start_s: float | None = None  # None: _BUILT_UP of the time in which requests arrive
    trace_duration_s: float = 30.0
    sample_s: float | None = None

    def __post_init__(self) -> None:
        check_ranges("record", self, 0.0, 1e9, "trace_start_s", "trace_duration_s")
        check_ranges("record", self, 1e-3, 1e9, "sample_s")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A directory for one run; made by create(), read by commands that look at it later."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, config_yaml: str, seed: int, origin: Mapping[str, Any] = MappingProxyType({})
    ) -> RunDirectory:
        """An empty directory with what is known before the run. Raises ConfigError if it holds something already.

        origin: where the run comes from, for run.json.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_empty = next(path.iterdir(), None) is None
            if is_empty:
                (path / CONFIG).write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"out={path}: cannot be written ({error.strerror}); name another directory") from error
        if not is_empty:
            raise ConfigError(f"out={path}: not empty; name another directory, or remove it first")
        directory = cls(path)
        versions = {"megatron_medha": version("megatron_medha"), "python": platform.python_version()}
        directory.write_json(RUN, {"seed": seed, "versions": versions, **origin})
        return directory

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write one JSON file."""
        (self.path / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def recording(
        self, config: SimulationConfig, record: RecordConfig, last_arrival_s: float
    ) -> Iterator[SimulationHooks]:
        """What has to look on for the files to be written; they are complete when the context ends."""
        with ExitStack() as stack:
            requests = stack.enter_context((self.path / REQUESTS).open("w", encoding="utf-8"))
            samples = stack.enter_context((self.path / SAMPLES).open("w", encoding="utf-8"))
            watchers = SimulationHooks()
            timeline: Timeline | None = None
            if record.trace_duration_s:
                start_s = _BUILT_UP * last_arrival_s if record.trace_start_s is None else record.trace_start_s
                end_s = start_s + record.trace_duration_s
                stream = stack.enter_context((self.path / TRACE).open("w", encoding="utf-8"))
                rank_name = "KVP rank" if config.instances is None else "instance"
                lanes = config.pipeline()
                timeline = Timeline(
                    stream, spp=lanes.spp, kvp=lanes.kvp, rank_name=rank_name, start_s=start_s, end_s=end_s
                )
                stack.callback(timeline.close)
                watchers.on_span = timeline.span
                watchers.observers += (timeline,)
            if record.decision_log:
                log = stack.enter_context((self.path / DECISIONS).open("w", encoding="utf-8"))
                watchers.observers += (DecisionLog(log, config.setup.header()),)

            def ended(outcome: RequestStats) -> None:
                requests.write(json.dumps(self.request_values(outcome, config.classes, config.slo)) + "\n")
                if timeline is not None:
                    timeline.ended(outcome)

            watchers.on_outcome = ended
            watchers.on_sample = lambda sample: _write_sample(samples, sample)
            yield watchers

    def finish(self, values: dict[str, Any], table: str) -> None:
        """Write what came out; a directory with a summary is a run that went to its end."""
        self.write_json(SUMMARY, values)
        (self.path / TABLE).write_text(table, encoding="utf-8")

    def request_values(self, outcome: RequestStats, classes: LengthClasses, slo: Slo) -> dict[str, Any]:
        """A request as one line of requests.jsonl."""
        request = outcome.request
        values: dict[str, Any] = {
            "request_id": request.request_id,
            "length_class": classes.of(request.num_prompt_tokens),
            "arrival_s": _rounded(request.arrival_s),
            "prompt_tokens": request.num_prompt_tokens,
            "output_tokens": request.max_output_tokens,
            "ending": outcome.ending.value,
            "why": outcome.why,
            "tokens_out": outcome.num_tokens_out,
            "first_scheduled_s": _rounded(outcome.first_scheduled_s),
            "first_token_s": _rounded(outcome.first_token_s),
            "last_token_s": _rounded(outcome.last_token_s),
            "deadline_s": _rounded(slo.deadline_s(outcome.isolated_s)),
            "cached_tokens": outcome.num_cached_tokens,
            "num_preemptions": outcome.num_preemptions,
            "num_tokens_lost": outcome.num_tokens_lost,
            "meets_slo": slo.is_met(outcome),
        }
        return values | {name: _rounded(getattr(outcome, name)) for name in _LATENCIES}


def _write_sample(stream: Any, sample: StateSample) -> None:
    values = {
        "now_s": _rounded(sample.now_s),
        "num_ended": sample.num_ended,
        "num_decoding": sample.num_decoding,
        "kv_used_share": _rounded(sample.kv_used_share),
        "waiting": [
            [one.request_id, one.length_class, _rounded(one.relative_slack), one.is_started] for one in sample.waiting
        ],
    }
    stream.write(json.dumps(values, separators=(",", ":")) + "\n")


def _rounded(value: float | None) -> float | None:
    """To a microsecond: enough for every figure, and files half the size."""
    return None if value is None else round(value, 6)
