"""`medha explain RUN REQUEST`: why this request waited, step by step, from the run's decision log."""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.request import Request
from megatron_medha.sim.run_directory import CONFIG, DECISIONS, REQUESTS
from megatron_medha.sim.system import build_scheduler, recorded_setup
from megatron_medha.stats.decision_log import ReplayError, read_log
from megatron_medha.stats.explanation import Explanation, RequestAhead, RequestPhase, WaitReason, explain_request
from megatron_medha.stats.shared_prefix import SharedPrefix

USAGE = """\
usage: medha explain RUN REQUEST

Replays a recorded run and follows one request: which requests were computed before it, with which slack, and where it
waited for memory or for the pipeline. RUN is the directory of a simulation with record=full, or a decision log. REQUEST
is an id from the run's requests.jsonl; "worst-short" and "worst-long" are the requests of that length class with the
longest TTFT.

examples:
  medha simulate workload.duration_s=300 record=full out=runs/a
  medha explain runs/a r17
  medha explain runs/a worst-short
"""

_MAX_PHASES = 40
_MAX_NAMES = 3
_DEPRIORITIZED = (
    "its deadline can no longer be met: prompts that can still meet theirs run first, and it gets "
    "scheduler.progress_share once it is the longest overdue (scheduler.has_triage)"
)


def run(words: Sequence[str]) -> int:
    """Explain one request."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if len(words) != 2:
        raise ConfigError("give one run and one request: medha explain RUN REQUEST")
    log = _log(Path(words[0]).expanduser())
    request_id = _request_id(log.parent, words[1])
    # Closed before anything is printed: the log is read only until the request has ended, and the bar would stay.
    with log.open(encoding="utf-8") as stream, closing(_with_progress(stream, log)) as lines:
        try:
            header, records = read_log(lines)
            setup = recorded_setup(header)
            granule_tokens = setup.kv.tokens_per_granule(setup.block_size) if setup.kv.prefix_cache else None
            found = explain_request(records, build_scheduler(setup), request_id, granule_tokens)
        except (ReplayError, UnicodeDecodeError) as error:
            raise ReplayError(f"{log}: {error}") from error
    if found is None:
        raise ConfigError(f"{request_id}: no such request in {log}; requests.jsonl beside it lists them")
    print(text_of(found), end="")
    return 0


def text_of(found: Explanation) -> str:
    """The explanation for a terminal."""
    stats = found.stats
    lines = [*_head(found), ""]
    if stats.why is not None:
        return "\n".join([*lines, f"rejected: {stats.why}", ""])
    lines.append(f"{'from, s':>11} {'to, s':>11}  {'slack / work':>18}  what happened")
    if found.learnt_s > stats.request.arrival_s:
        lines.append(_row(stats.request.arrival_s, found.learnt_s, "", "not yet at the scheduler"))
    phases = found.at_most(_MAX_PHASES)
    rows: list[tuple[float, str]] = []
    for phase, end_s in zip(phases, [*(later.start_s for later in phases[1:]), stats.first_token_s], strict=True):
        slack = f"{phase.first_slack:.2f}" + (f" to {phase.last_slack:.2f}" if phase.num_batches > 1 else "")
        end_s = phase.end_s if end_s is None else end_s
        rows.append((phase.start_s, _row(phase.start_s, end_s, slack, _what(phase))))
    if found.deprioritized_s is not None:
        place = bisect_left(rows, found.deprioritized_s, key=lambda row: row[0])
        rows.insert(place, (found.deprioritized_s, _row(found.deprioritized_s, None, "", _DEPRIORITIZED)))
    return "\n".join([*lines, *(row for _, row in rows), *_tail(found), ""])


def _row(start_s: float, end_s: float | None, slack: str, what: str) -> str:
    end = "" if end_s is None else f"{end_s:.3f}"
    return f"{start_s:11.3f} {end:>11}  {slack:>18}  {what}"


def _head(found: Explanation) -> list[str]:
    stats = found.stats
    request = stats.request
    lines = [
        f"{request.request_id}: {request.num_prompt_tokens:,} prompt tokens, "
        f"up to {request.max_output_tokens:,} output tokens; "
        f"arrived at {request.arrival_s:.3f} s; policy {found.policy}"
    ]
    if stats.first_token_s is not None:
        ttft_s = stats.first_token_s - request.arrival_s
        late_s = stats.first_token_s - found.deadline_s
        kept = f"missed by {late_s:.3f} s" if late_s > 0 else f"met with {-late_s:.3f} s to spare"
        lines.append(
            f"first token after {ttft_s:.3f} s; predicted prefill time alone {found.work_s:.3f} s; "
            f"deadline {found.deadline_s - request.arrival_s:.3f} s: {kept}"
        )
    elif stats.why is None:
        lines.append("no first token before the run ended")
    lines.append(f"{found.num_ahead_on_arrival} other prefills were unfinished when it arrived")
    if found.shared is not None:
        lines += _cached(found, found.shared)
    return lines


def _cached(found: Explanation, shared: SharedPrefix) -> list[str]:
    """What the prefix cache had of a prompt, and where the prompt leaves what came before it."""
    request, granule = found.stats.request, shared.granule_tokens
    num_cached = min(found.num_cached_tokens, request.num_prompt_tokens)
    lines = [f"prefix cache: {num_cached:,} of its prompt tokens were there when it was first scheduled"]
    if not request.reads_cache:
        lines = ["prefix cache: not read, because the request asks for log-probabilities of its prompt"]
    in_session = _in_session(request)
    if not shared.num_tokens:
        return [*lines, f"no earlier request begins with its first {granule} tokens", *in_session]
    first, end = shared.num_tokens, shared.num_tokens + granule
    is_known = request.num_session_tokens is not None and first <= request.num_session_tokens < end
    lines.append(f"its first {first:,} tokens are those of {shared.request_id}")
    if not is_known and end <= request.num_prompt_tokens:
        lines[-1] += f"; in {first:,} to {end - 1:,} is the first that is new"
    lines += in_session
    usable = min(shared.num_tokens, (request.num_prompt_tokens - 1) // granule * granule)
    if request.reads_cache and num_cached < usable:
        lines.append(f"{usable - num_cached:,} of them had been evicted, or were not computed yet")
    return lines


def _in_session(request: Request) -> list[str]:
    """The first token that differs, which keys of granules do not tell."""
    count = request.num_session_tokens
    if count is None:
        return []
    if count >= request.num_prompt_tokens:
        return ["an earlier request of its session begins with all of it"]
    return [f"token {count:,}, counted from 0, is the first that its session did not have"]


def _what(phase: RequestPhase) -> str:
    batches = f"{phase.num_batches:,} batch{'es' if phase.num_batches > 1 else ''}"
    beside = _names(list(phase.ahead.values()))
    num_decodes = round(phase.num_decodes / phase.num_batches)
    decodes = f"{num_decodes} decode{'' if num_decodes == 1 else 's'}"
    match phase.why:
        case WaitReason.COMPUTED:
            shared = f", with {beside}" if beside else ""
            overtaking = f", {phase.num_overtaking:,} of which overtook others" if phase.num_overtaking else ""
            return f"computed: {phase.num_tokens:,} tokens in {batches}{overtaking}{shared}; {decodes}"
        case WaitReason.MIXED:
            return f"computed: {phase.num_tokens:,} tokens in {phase.num_computed:,} of {batches}; others: {beside}"
        case WaitReason.IN_FLIGHT:
            return f"its chunk is in flight; {batches} of others" + (f": {beside}" if beside else "")
        case WaitReason.HELD:
            return f"its chunk is held; overtaken by {batches}" + (f" of {beside}" if beside else "") + f"; {decodes}"
        case WaitReason.PREFIX:
            return f"{phase.awaited} computes a prefix that it shares; {batches}" + (f" for {beside}" if beside else "")
        case WaitReason.OUTRANKED:
            return f"outranked in {batches} by {beside}; {decodes}"
        case WaitReason.NO_MEMORY:
            return f"no KV memory for its whole prompt; {batches}" + (f" for {beside}" if beside else "")
        case WaitReason.NO_SEQUENCE_SLOT:
            return f"scheduler.max_num_sequences requests own KV already; {batches}" + (
                f" for {beside}" if beside else ""
            )
        case WaitReason.STEP_FULL:
            return f"step full: {batches} of decodes only, {decodes} each"


def _names(others: list[RequestAhead]) -> str:
    others = sorted(others, key=lambda one: -one.num_tokens)
    named = [
        f"{one.request.request_id} +{one.num_tokens:,} (slack {one.first_slack:.2f})" for one in others[:_MAX_NAMES]
    ]
    rest = others[_MAX_NAMES:]
    if rest:
        named.append(f"{len(rest)} more +{sum(one.num_tokens for one in rest):,}")
    return ", ".join(named)


def _tail(found: Explanation) -> list[str]:
    stats = found.stats
    lines: list[str] = []
    if stats.first_token_s is not None:
        end = "" if stats.last_token_s is None else f"; {stats.num_tokens_out:,} tokens by {stats.last_token_s:.3f} s"
        lines.append(_row(stats.first_token_s, None, "", f"first token{end}"))
    if stats.num_preemptions:
        lines.append(f"preempted {stats.num_preemptions} times, because decodes needed its KV blocks; "
            f"{stats.num_tokens_lost:,} tokens were recomputed")
    ahead = found.ahead
    if ahead:
        lines += ["", "requests that ran before it:"]
        for one in ahead[:10]:
            lines.append(
                f"  {one.request.request_id:<8} {one.request.num_prompt_tokens:>9,} prompt tokens, arrived at "
                f"{one.request.arrival_s:.3f} s: {one.num_tokens:,} tokens in {one.num_batches:,} batches, "
                f"slack / work {one.first_slack:.2f} to {one.last_slack:.2f}"
            )
        if len(ahead) > 10:
            lines.append(f"  and {len(ahead) - 10} more with {sum(one.num_tokens for one in ahead[10:]):,} tokens")
    return lines


def _log(run: Path) -> Path:
    if run.is_file():
        return run
    if (run / DECISIONS).is_file():
        return run / DECISIONS
    if (run / CONFIG).is_file():
        raise ConfigError(f"{run}: this run has no decision log; run it again with record=full")
    raise ConfigError(f"{run}: no run of medha simulate, and no decision log")


def _request_id(run: Path, word: str) -> str:
    name = word.removeprefix("worst-")
    if name == word:
        return word
    if not (run / REQUESTS).is_file():
        raise ConfigError(f"{word}: {run} has no {REQUESTS} to look it up in; give a request's id")
    with (run / REQUESTS).open(encoding="utf-8") as stream:
        requests = list(map(json.loads, stream))
    of_class = [values for values in requests if values["length_class"] == name]
    if not of_class:
        others = sorted({f"worst-{values['length_class']}" for values in requests})
        raise ConfigError(f"{word}: {run} has no request of that class; it has {' and '.join(others)}")
    return str(max(of_class, key=lambda values: values["ttft_s"] or 0.0)["request_id"])


def _with_progress(stream: TextIO, log: Path) -> Generator[str, None, None]:
    size = log.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:
        for line in stream:
            bar.update(len(line))
            yield line
