"""Routes that explain: /debug/schedule, /debug/requests, /debug/live, and the page at /dashboard that shows them."""

from __future__ import annotations

import asyncio
import importlib.resources
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.server.http.http_errors import ApiError
from megatron_medha.server.http.routing import Api, Shape, json_response
from megatron_medha.server.observe.metrics import Histogram
from megatron_medha.server.observe.queue_view import QueueView
from megatron_medha.server.observe.request_log import RequestTrace
from megatron_medha.server.observe.steps import StepRecord
from megatron_medha.server.service import Service

MAX_LISTED = 100       # stories in a list
MAX_REQUESTS_AHEAD = 8    # named of those that ran while a request waited
_VIEW_WAIT_S = 0.5     # for the first look after nobody has watched for a while
_VIEW_POLL_S = 0.02
_SHAPE = Shape(errors=(401, 403, 404, 503))


class WaitInterval(msgspec.Struct, frozen=True):
    """A time in which a request was not run, and who was."""

    from_s: float            # since its arrival, as all times here
    until_s: float
    why: str
    num_steps: int
    went_first: list[dict[str, Any]]  # most tokens first: request_id, num_tokens, relative_slack when it was chosen
    slack_from_s: float
    slack_until_s: float


class RunInterval(msgspec.Struct, frozen=True):
    """Chunks in a row."""

    from_s: float
    until_s: float
    batches: tuple[int, int]
    start: int
    num_tokens: int
    num_chunks: int
    slack_s: float
    relative_slack: float


class RequestTraceResponse(msgspec.Struct, frozen=True):
    """All that is remembered of one request."""

    request_id: str
    replica: int
    slo_class: str
    priority: int
    num_prompt_tokens: int
    max_output_tokens: int
    num_scheduled_tokens: int
    deadline_s: float        # since its arrival
    total_work_s: float
    remaining_work_s: float
    age_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    ended_s: float | None
    outcome: str             # "" while it lives
    num_pauses: int
    losses: list[dict[str, Any]]
    timeline: list[WaitInterval | RunInterval]
    slack: list[tuple[float, float]]  # (seconds since arrival, slack in seconds), joined by straight lines


def add_routes(app: Api, service: Service) -> None:
    """Put the routes into the application."""
    page = importlib.resources.files("megatron_medha.server.observe").joinpath("dashboard.html").read_bytes()

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
        steps = [_step(step) for step in _latest_steps(service, 20)]
        return json_response({"view": await _fresh_view(service), "steps": steps})

    @app.get("/debug/live", _SHAPE)
    async def live(_: Request) -> Response:
        """Everything the page shows, in one answer."""
        metrics, load = service.metrics, service.engine.load
        return json_response({
            "now_s": service.engine.now_s(),
            "status": "draining" if service.lifecycle.is_draining else service.status.phase.value,
            "model": next(iter(service.served_names()), ""),
            "device": service.engine.facts.device if service.engine.facts is not None else "",
            "view": await _fresh_view(service),
            "load": {
                "num_blocks": load.num_blocks, "num_free_blocks": load.num_free_blocks,
                "num_waiting_tokens": service.admission.num_waiting_tokens, "num_live": service.admission.num_live,
            },
            "ttft": _histogram(metrics.ttft_s),
            "inter_token": _histogram(metrics.inter_token_s),
            "num_met": sum(metrics.num_deadlines_met.copy().values()),
            "num_missed": sum(metrics.num_deadlines_missed.copy().values()),
            "num_output_tokens": metrics.num_output_tokens,
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
        """One request's story: the id of an answer, or of one of its choices (ID-0, ID-1...)."""
        response_id = request.path_params["response_id"]
        ids = service.journal.request_ids_of(response_id)
        traces = [trace for one in ids if (trace := service.journal.trace(one)) is not None]
        if not traces:
            raise ApiError(404, f"no request `{response_id[:80]}` is remembered", code="request_not_found")
        now_s = service.engine.now_s()
        steps = service.journal.steps_between(
            min(trace.request.arrival_s for trace in traces), max(trace.ended_s or now_s for trace in traces)
        )
        # Thousands of steps are gone through for a long one: not on the loop that serves tokens.
        told = await asyncio.to_thread(lambda: [explain_trace(trace, steps, now_s) for trace in traces])
        return json_response({"choices": told})


def explain_trace(trace: RequestTrace, steps: Sequence[StepRecord], now_s: float) -> RequestTraceResponse:
    """The story with its waits explained by the steps that went on meanwhile, on its own replica."""
    steps = [step for step in steps if step.replica == trace.replica]
    request, begin_s = trace.request, trace.request.arrival_s
    timeline: list[WaitInterval | RunInterval] = []
    slack = [(0.0, trace.deadline_s - begin_s - trace.total_work_s)]
    waiting_since_s = begin_s
    is_held = False  # it owns KV
    for run in trace.runs:
        if any(waiting_since_s <= lost.at_s <= run.from_s for lost in trace.losses):
            is_held = False
        wait = _wait(trace, steps, waiting_since_s, run.from_s, is_held, slack[-1][1], run.slack_s)
        if wait is not None:
            timeline.append(wait)
        timeline.append(
            RunInterval(
                run.from_s - begin_s, run.until_s - begin_s, (run.first_batch, run.last_batch), run.start,
                run.num_tokens, run.num_chunks, run.slack_s, run.relative_slack,
            )
        )  # fmt: skip
        slack.append((run.from_s - begin_s, run.slack_s))
        waiting_since_s, is_held = run.until_s, True
    is_prefill = trace.first_token_s is None
    end_s = trace.ended_s or now_s
    if is_prefill:
        last_slack_s = trace.deadline_s - end_s - trace.remaining_work_s
        wait = _wait(trace, steps, waiting_since_s, end_s, is_held, slack[-1][1], last_slack_s)
        if wait is not None:
            timeline.append(wait)
        slack.append((end_s - begin_s, last_slack_s))
    else:
        assert trace.first_token_s is not None
        slack.append((trace.first_token_s - begin_s, trace.deadline_s - trace.first_token_s))
    return RequestTraceResponse(
        request_id=request.request_id,
        replica=trace.replica,
        slo_class=request.slo_class,
        priority=request.priority,
        num_prompt_tokens=request.num_prompt_tokens,
        max_output_tokens=request.max_output_tokens,
        num_scheduled_tokens=trace.num_scheduled_tokens,
        deadline_s=trace.deadline_s - begin_s,
        total_work_s=trace.total_work_s,
        remaining_work_s=trace.remaining_work_s,
        age_s=end_s - begin_s,
        first_scheduled_s=_since(trace.first_scheduled_s, begin_s),
        first_token_s=_since(trace.first_token_s, begin_s),
        ended_s=_since(trace.ended_s, begin_s),
        outcome=trace.outcome,
        num_pauses=trace.num_pauses,
        losses=[{"at_s": lost.at_s - begin_s, "num_tokens": lost.num_tokens, "why": lost.why} for lost in trace.losses],
        timeline=timeline,
        slack=slack,
    )


def _wait(
    trace: RequestTrace,
    steps: Sequence[StepRecord],
    from_s: float,
    until_s: float,
    is_held: bool,
    slack_from_s: float,
    slack_until_s: float,
) -> WaitInterval | None:
    """What went on between two runs; None if no step did. steps: of one replica, in order."""
    own_id, begin_s = trace.request.request_id, trace.request.arrival_s
    # A long story has hundreds of waits among thousands of steps.
    first = bisect_right(steps, from_s, key=lambda step: step.at_s)
    last = bisect_left(steps, until_s, lo=first, key=lambda step: step.at_s)
    between = [step for step in steps[first:last] if all(part.request_id != own_id for part in step.parts)]
    if not between:
        return None
    num_tokens: dict[str, int] = {}
    slacks: dict[str, float] = {}
    for step in between:
        for part in step.parts:
            num_tokens[part.request_id] = num_tokens.get(part.request_id, 0) + part.num_tokens
            slacks.setdefault(part.request_id, part.relative_slack)
    most = sorted(num_tokens, key=lambda one: -num_tokens[one])[:MAX_REQUESTS_AHEAD]
    num_without_memory = sum(step.num_free_blocks < trace.num_blocks_needed for step in between)
    if not is_held and 2 * num_without_memory > len(between):
        why = "not enough free KV memory"
    elif num_tokens:
        why = "others were more urgent" if not is_held else "others were more urgent; its KV was kept"
    else:
        why = "running answers filled the steps"
    return WaitInterval(
        from_s=from_s - begin_s,
        until_s=until_s - begin_s,
        why=why,
        num_steps=len(between),
        went_first=[
            {"request_id": one, "num_tokens": num_tokens[one], "relative_slack": slacks[one]} for one in most
        ],
        slack_from_s=slack_from_s,
        slack_until_s=slack_until_s,
    )


async def _fresh_view(service: Service) -> QueueView | None:
    """A look that is fresh, as far as the engine does anything at all; None before it is ready."""
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


def _latest_steps(service: Service, count: int) -> list[StepRecord]:
    now_s = service.engine.now_s()
    return service.journal.steps_between(0.0, now_s)[-count:]


def _step(step: StepRecord) -> dict[str, Any]:
    return {
        "batch_id": step.batch_id,
        "replica": step.replica,
        "at_s": step.at_s,
        "num_decodes": step.num_decodes,
        "num_tokens": step.num_tokens,
        "predicted_s": step.predicted_s,
        "actual_s": step.duration_s,
        "budget_s": step.budget_s,
        "num_free_blocks": step.num_free_blocks,
        "chunks": step.parts,
    }  # fmt: skip


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"bounds": histogram.bounds, "counts": list(histogram.counts), "total": histogram.total}


def _since(at_s: float | None, begin_s: float) -> float | None:
    return None if at_s is None else at_s - begin_s
