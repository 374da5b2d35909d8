"""Routes that explain: /debug/schedule, /debug/requests, /debug/live, and the page at /dashboard that shows them."""

from __future__ import annotations

import asyncio
import importlib.resources
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.routing import Api, Shape, json_response
from megatron_medha.server.observe.queue_view import QueueView
from megatron_medha.server.observe.request_log import KVLoss, RequestSummary, RequestTrace, RunInterval
from megatron_medha.server.observe.steps import StepRecord
from megatron_medha.server.service import Service

MAX_LISTED = 100          # requests in a list
_NUM_STEPS = 20           # the latest, in /debug/schedule
MAX_REQUESTS_AHEAD = 8    # named of those that ran while a request waited
_VIEW_WAIT_S = 0.5     # for the first view after a while without requests for one
_VIEW_POLL_S = 0.02
_SHAPE = Shape(errors=(400, 401, 403, 404, 503))


class WaitInterval(msgspec.Struct, frozen=True):
    """A time in which a request was not run, and who was."""

    from_s: float            # since its arrival, as all times here
    until_s: float
    why: str
    num_steps: int
    went_first: list[dict[str, Any]]  # most tokens first: request_id, num_tokens, relative_slack when it was chosen
    slack_from_s: float
    slack_until_s: float


class RequestTraceResponse(RequestSummary, frozen=True, kw_only=True):
    """All that is remembered of one request."""

    replica: int
    priority: int
    max_output_tokens: int
    num_cached_tokens: int   # of its prompt, in the prefix cache when it was first scheduled
    session_id: str
    num_session_tokens: int | None  # of its prompt, up to the first that its session did not have; null: not known
    deadline_s: float        # since its arrival
    total_work_s: float
    remaining_work_s: float
    age_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    losses: list[KVLoss]
    timeline: list[WaitInterval | RunInterval]
    slack: list[tuple[float, float]]  # (seconds since arrival, slack in seconds), joined by straight lines


def add_routes(app: Api, service: Service) -> None:
    """Put the routes into the application."""
    page = importlib.resources.files("megatron_medha.server.observe").joinpath("dashboard.html").read_bytes()

    async def to_dashboard(_: Request) -> Response:
        """Where a browser goes that was given the server's address."""
        return Response(status_code=307, headers={"location": "dashboard"})

    app.add_api_route("/", "GET", None, to_dashboard)

    @app.get("/dashboard")
    async def dashboard(_: Request) -> Response:
        """A page without any outside asset; what it shows comes from /debug/live, with a key where one is needed."""
        headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; frame-ancestors 'none'",
        }
        return Response(page, headers=headers)

    @app.get("/debug/schedule", _SHAPE)
    async def schedule(_: Request) -> Response:
        """Who waits, with how much slack and why; what is in flight."""
        steps = service.journal.steps_between(0.0, service.engine.now_s())[-_NUM_STEPS:]
        return json_response({"view": await _fresh_view(service), "steps": steps})

    @app.get("/debug/live", _SHAPE)
    async def live(request: Request) -> Response:
        """All data of the dashboard; ?since=SECONDS leaves out samples that were taken before then."""
        metrics, load, now_s = service.metrics, service.engine.load, service.engine.now_s()
        return json_response({
            "now_s": now_s,
            "status": "draining" if service.lifecycle.is_draining else service.status.phase.value,
            "model": next(iter(service.served_names()), ""),
            "device": service.engine.facts.device if service.engine.facts is not None else "",
            "view": await _fresh_view(service),
            "load": {
                "num_blocks": load.num_blocks, "num_free_blocks": load.num_free_blocks,
                "num_cached_blocks": load.num_cached_blocks,
                "num_waiting_tokens": service.admission.num_waiting_tokens, "num_live": service.admission.num_live,
            },
            **service.history.latencies(now_s),
            "history": service.history.since(_since(request)),
            "num_met": sum(metrics.num_deadlines_met.copy().values()),
            "num_missed": sum(metrics.num_deadlines_missed.copy().values()),
            "num_output_tokens": metrics.num_output_tokens,
            "num_prefix_queries": metrics.num_prefix_queries,
            "num_prefix_hits": metrics.num_prefix_hits,
            "num_refused": sum(service.admission.num_refused.values()),
            "stage_busy_s": metrics.stage_busy_s,
            "work_present_s": metrics.work_present_s,
            "recent": service.journal.recent(30),
        })  # fmt: skip

    @app.get("/debug/requests", _SHAPE)
    async def requests(_: Request) -> Response:
        """The newest requests, newest first."""
        return json_response({"requests": service.journal.recent(MAX_LISTED)})

    @app.get("/debug/requests/{response_id}", _SHAPE)
    async def request(request: Request) -> Response:
        """The trace of one request, by the id of a response or of one of its choices (ID-0, ID-1...)."""
        response_id = request.path_params["response_id"]
        ids = service.journal.request_ids_of(response_id)
        traces = [trace for one in ids if (trace := service.journal.trace(one)) is not None]
        if not traces:
            raise ApiError(404, f"no request `{response_id[:80]}` is remembered", code="request_not_found")
        now_s = service.engine.now_s()
        steps = service.journal.steps_between(
            min(trace.request.arrival_s for trace in traces), max(trace.ended_s or now_s for trace in traces)
        )
        # On a thread: a long request has thousands of steps.
        choices = await asyncio.to_thread(lambda: [explain_trace(trace, steps, now_s) for trace in traces])
        return json_response({"choices": choices})


def explain_trace(trace: RequestTrace, steps: Sequence[StepRecord], now_s: float) -> RequestTraceResponse:
    """The trace, with each wait explained by the steps of its replica during it."""
    steps = [step for step in steps if step.replica == trace.replica]
    summary = RequestSummary.of(trace)
    begin_s, deadline_s = trace.request.arrival_s, summary.target_s
    age_s = (trace.ended_s or now_s) - begin_s
    timeline: list[WaitInterval | RunInterval] = []
    slack = [(0.0, deadline_s - trace.total_work_s)]

    def wait(until_s: float, slack_s: float) -> None:
        from_s = timeline[-1].until_s if timeline else 0.0
        has_kv = bool(timeline) and not any(from_s <= lost.at_s <= until_s for lost in trace.losses)
        between = _steps_without(trace, steps, from_s, until_s)
        if between:
            timeline.append(_wait(trace, between, from_s, until_s, has_kv, (slack[-1][1], slack_s)))
        slack.append((until_s, slack_s))

    for run in trace.runs:
        wait(run.from_s, run.slack_s)
        timeline.append(run)
    if summary.ttft_s is None:
        wait(age_s, deadline_s - age_s - trace.remaining_work_s)
    else:
        slack.append((summary.ttft_s, deadline_s - summary.ttft_s))
    return RequestTraceResponse(
        **msgspec.structs.asdict(summary),
        replica=trace.replica,
        priority=trace.request.priority,
        max_output_tokens=trace.request.max_output_tokens,
        num_cached_tokens=trace.num_cached_tokens or 0,
        session_id=trace.request.session_id,
        num_session_tokens=trace.request.num_session_tokens,
        deadline_s=deadline_s,
        total_work_s=trace.total_work_s,
        remaining_work_s=trace.remaining_work_s,
        age_s=age_s,
        first_scheduled_s=trace.scheduling_delay_s,
        first_token_s=summary.ttft_s,
        losses=list(trace.losses),
        timeline=timeline,
        slack=slack,
    )


def _steps_without(
    trace: RequestTrace, steps: Sequence[StepRecord], from_s: float, until_s: float
) -> list[StepRecord]:
    """The steps between two runs of a request. steps: of one replica, in order; there may be thousands."""
    own_id, begin_s = trace.request.request_id, trace.request.arrival_s
    first = bisect_right(steps, begin_s + from_s, key=lambda step: step.at_s)
    last = bisect_left(steps, begin_s + until_s, lo=first, key=lambda step: step.at_s)
    return [step for step in steps[first:last] if all(chunk.request_id != own_id for chunk in step.chunks)]


def _wait(
    trace: RequestTrace, between: Sequence[StepRecord], from_s: float, until_s: float, has_kv: bool,
    slack_s: tuple[float, float],
) -> WaitInterval:  # fmt: skip
    """What went on meanwhile. slack_s: when the wait began and when it ended."""
    num_tokens: Counter[str] = Counter()
    slacks: dict[str, float] = {}
    for step in between:
        for chunk in step.chunks:
            num_tokens[chunk.request_id] += chunk.num_tokens
            slacks.setdefault(chunk.request_id, chunk.relative_slack)
    num_without_memory = sum(step.num_free_blocks < trace.num_blocks_needed for step in between)
    if not has_kv and 2 * num_without_memory > len(between):
        why = "not enough free KV memory"
    elif num_tokens:
        why = "others were more urgent; its KV was kept" if has_kv else "others were more urgent"
    else:
        why = "decodes filled the steps"
    most = num_tokens.most_common(MAX_REQUESTS_AHEAD)
    went_first = [{"request_id": one, "num_tokens": count, "relative_slack": slacks[one]} for one, count in most]
    return WaitInterval(from_s, until_s, why, len(between), went_first, *slack_s)


async def _fresh_view(service: Service) -> QueueView | None:
    """A view less than a second old while the engine works; None before it is ready."""
    now_s = service.engine.now_s()
    view = service.journal.look(now_s)
    num_looks = int(_VIEW_WAIT_S / _VIEW_POLL_S)
    while (view is None or view.at_s < now_s - 1.0) and service.admission.num_live and num_looks:
        await asyncio.sleep(_VIEW_POLL_S)
        view = service.journal.look(service.engine.now_s())
        num_looks -= 1
    if view is not None and not service.admission.num_live and view.at_s < now_s - 1.0:
        # Nothing has happened since, and nothing is there: what was seen then is over.
        return msgspec.structs.replace(
            view, at_s=now_s, num_waiting=0, num_prefilling=0, num_decoding=0, queue=(), decoding=(), in_flight=()
        )
    return view


def _since(request: Request) -> float:
    try:
        return float(request.query_params.get("since", "-inf"))
    except ValueError:
        raise ApiError(400, "since: not a number of seconds", param="since") from None
