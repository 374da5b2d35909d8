"""The HTTP application: routes over one engine; run_server.py runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EngineClient, EnginePhase
from megatron_medha.server import debug_routes as insight
from megatron_medha.server import openapi
from megatron_medha.server.anthropic import anthropic_messages
from megatron_medha.server.auth import FrontDoor
from megatron_medha.server.bodies import openai_types as types
from megatron_medha.server.bodies.anthropic_types import MessagesAnswer, MessagesRequest, TokenCount
from megatron_medha.server.bodies.responses_types import ResponseAnswer, ResponsesRequest
from megatron_medha.server.generate import Answer
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.http import http_errors as errors
from megatron_medha.server.http.disconnect import unless_gone
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.request_body import decode_request
from megatron_medha.server.http.routing import Api
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.metrics_page import CONTENT_TYPE, MetricsPage
from megatron_medha.server.observe.request_log import Journal
from megatron_medha.server.observe.tracing import Traces
from megatron_medha.server.openai import chat_completions as chat
from megatron_medha.server.openai import completions as completion
from megatron_medha.server.openai import responses, tokenize
from megatron_medha.server.openai.request_fields import read_body, read_wishes
from megatron_medha.server.openai.wire_format import WireFormat, encode_json
from megatron_medha.server.ready import Ready
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.server.slo import SloConfig
from megatron_medha.text.sampling_defaults import OPENAI_DEFAULTS, SamplingDefaults
from megatron_medha.text.template_renders import TemplateRenders
from megatron_medha.text.tokenizer import Tokenizer

MakeAnswer = Callable[[Request, Ready, GenerationSpec, WireFormat], Answer]
BODY_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503)


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer | Future[Tokenizer],
    config: ServerConfig,
    metrics: Metrics | None = None,
    *,
    journal: Journal | None = None,
    slo: SloConfig | None = None,
    read_config: Callable[[], ServerConfig] | None = None,
    traces: Traces | None = None,
    model_name: str = "",
    renders: TemplateRenders | None = None,
    sampling_defaults: SamplingDefaults = OPENAI_DEFAULTS,
) -> Api:
    """The application. It starts the engine when it starts, and stops it when it stops.

    metrics, journal: those that watch the engine; without them, step metrics and stories stay empty.
    read_config: reads the configuration again when the server is told to reload.
    traces: where requests are traced to. model_name: on metrics, until the checkpoint's own name is known.
    renders: of another owner, who closes them. sampling_defaults: for what requests leave out.
    """
    metrics = Metrics() if metrics is None else metrics
    service = Service(
        engine,
        tokenizer,
        config,
        metrics=metrics,
        journal=Journal(metrics) if journal is None else journal,
        slo=SloConfig() if slo is None else slo,
        read_config=read_config,
        traces=traces,
        renders=renders,
        sampling_defaults=sampling_defaults,
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await service.start()
        except Exception as error:
            app.state.startup_error = error  # uvicorn logs it and forgets it; run() raises it
            raise
        yield
        await service.stop()

    app = Api(
        title="megatron_medha", version=package_version(), lifespan=lifespan, components=openapi.components
    )
    app.state.service = service
    app.state.startup_error = None
    errors.install(app)
    app.add_middleware(FrontDoor, service=service)
    _add_generation_routes(app, service)
    _add_token_routes(app, service)
    _add_model_routes(app, service)
    _add_probe_routes(app, service, MetricsPage(metrics, engine, service.admission, service.slo.names), model_name)
    _add_admin_routes(app, service)
    insight.add_routes(app, service)
    return app


def package_version() -> str:
    """Of the installed package."""
    try:
        return version("megatron_medha")
    except PackageNotFoundError:
        return "0+unknown"


def _add_generation_routes(app: Api, service: Service) -> None:
    def answer(request: Request, ready: Ready, spec: GenerationSpec, wire: WireFormat) -> Answer:
        # From here to the answer's own start nothing waits, so that the ticket cannot be lost.
        service.check_open()
        ticket = service.admission.admit(service.config, request.state.client_key, spec)
        service.metrics.answer_began(spec)
        return Answer(spec, wire, service, ready, ticket)

    @app.post("/v1/completions", openapi_extra=openapi.operation(
        types.CompletionAnswer, body=types.CompletionRequest, errors=BODY_ERRORS, has_events=True))
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            arrival_s = service.engine.now_s()
            ready = service.ready()
            wishes = read_wishes(request, service.slo)
            body = await decode_request(raw, completion.BODY, ready.prompt_limits)
            planning = completion.plan_completion(service, ready, body, wishes, arrival_s)
            spec = await unless_gone(request, held.num_bytes, planning)
        return answer(request, ready, spec, completion.CompletionFormat(spec, ready.tokenizer))

    @app.post("/v1/chat/completions", openapi_extra=openapi.operation(
        types.ChatAnswer, body=types.ChatRequest, errors=BODY_ERRORS, has_events=True))
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            arrival_s = service.engine.now_s()
            ready = service.ready()
            wishes = read_wishes(request, service.slo)
            body = await decode_request(raw, chat.BODY, ready.prompt_limits)
            spec = await unless_gone(request, held.num_bytes, chat.plan_chat(service, ready, body, wishes, arrival_s))
        return answer(request, ready, spec, chat.ChatFormat(spec, ready.tokenizer))

    @app.post("/v1/responses", openapi_extra=openapi.operation(
        ResponseAnswer, body=ResponsesRequest, errors=BODY_ERRORS, has_events=True))
    async def create_response(request: Request) -> Response:
        """Answer a chat, as OpenAI's newer clients send it. Answers are not stored."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            arrival_s = service.engine.now_s()
            ready = service.ready()
            wishes = read_wishes(request, service.slo)
            body = await decode_request(raw, responses.BODY, ready.prompt_limits)
            client: str = request.state.client_key.name
            planning = responses.plan_response(service, ready, body, wishes, arrival_s, client)
            wire = await unless_gone(request, held.num_bytes, planning)
        return answer(request, ready, wire.spec, wire)

    _add_anthropic_routes(app, service, answer)


def _add_anthropic_routes(app: Api, service: Service, answer: MakeAnswer) -> None:
    @app.post("/v1/messages", openapi_extra=openapi.operation(
        MessagesAnswer, body=MessagesRequest, errors=BODY_ERRORS, error=errors.AnthropicError, has_events=True))
    async def create_message(request: Request) -> Response:
        """Answer a chat, as Anthropic's clients send it."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            arrival_s = service.engine.now_s()
            ready = service.ready()
            wishes = read_wishes(request, service.slo)
            body = await decode_request(raw, anthropic_messages.BODY, ready.prompt_limits)
            planning = anthropic_messages.plan_message(service, ready, body, wishes, arrival_s)
            spec = await unless_gone(request, held.num_bytes, planning)
        return answer(request, ready, spec, anthropic_messages.MessagesFormat(spec))

    @app.post("/v1/messages/count_tokens", openapi_extra=openapi.operation(
        TokenCount, body=MessagesRequest, errors=BODY_ERRORS, error=errors.AnthropicError))
    async def count_message_tokens(request: Request) -> Response:
        """How many tokens the prompt of a chat has."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            ready = service.ready()
            body = await decode_request(raw, anthropic_messages.BODY, ready.prompt_limits)
            counting = anthropic_messages.count_tokens(service, ready, body)
            return _json(await unless_gone(request, held.num_bytes, counting))


def _add_token_routes(app: Api, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=openapi.operation(
        types.TokenizeAnswer, body=types.TokenizeRequest, errors=BODY_ERRORS))
    async def tokenize_text(request: Request) -> Response:
        """Token ids of a prompt or of messages."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            ready = service.ready()
            body = await decode_request(raw, tokenize.TOKENIZE_BODY, ready.prompt_limits)
            return await unless_gone(request, held.num_bytes, tokenize.tokenize(service, ready, body))

    @app.post("/detokenize", openapi_extra=openapi.operation(
        types.DetokenizeAnswer, body=types.DetokenizeRequest, errors=BODY_ERRORS))
    async def detokenize_ids(request: Request) -> Response:
        """Text of token ids."""
        with service.hold_body() as held:
            raw = await read_body(request, service, held)
            ready = service.ready()
            body = await decode_request(raw, tokenize.DETOKENIZE_BODY, ready.prompt_limits)
            return await unless_gone(request, held.num_bytes, tokenize.detokenize(service, ready, body))


def _add_model_routes(app: Api, service: Service) -> None:
    def describe(name: str) -> types.Model:
        facts = service.engine.facts
        return types.Model(
            id=name,
            created=service.started_unix_s,
            root=facts.shape.name if facts is not None else name,
            max_model_len=facts.max_request_tokens if facts is not None else None,
            sampling_defaults=service.sampling_defaults,
        )

    @app.get("/v1/models", openapi_extra=openapi.operation(types.ModelList, errors=(401,)))
    async def models() -> Response:
        """The models that are served."""
        return _json(types.ModelList(data=[describe(name) for name in service.served_names()]))

    @app.get("/v1/models/{name:path}", openapi_extra=openapi.operation(types.Model, errors=(401, 404)))
    async def model(name: str) -> Response:
        """One of them."""
        return _json(describe(service.model_name(name)))


def _add_probe_routes(app: Api, service: Service, page: MetricsPage, model_name: str) -> None:
    def readiness() -> types.Readiness:
        status = service.status
        phase = "draining" if service.is_draining else status.phase.value
        return types.Readiness(status=phase, detail=status.detail, fraction=status.fraction)

    async def health() -> Response:
        """200 while the process lives and the engine has not failed."""
        has_failed = service.status.phase is EnginePhase.FAILED
        return _json(readiness(), 503 if has_failed else 200)

    async def ready() -> Response:
        """200 once requests are taken; until then 503, saying how far loading is."""
        is_ready = service.status.phase is EnginePhase.READY and not service.is_draining
        headers = {} if is_ready else {"retry-after": str(service.config.retry_after_s)}
        return _json(readiness(), 200 if is_ready else 503, headers)

    async def tell_version() -> Response:
        """Of this server."""
        return _json(types.Version(version=package_version()))

    async def metrics() -> Response:
        """Prometheus' text format."""
        name = next(iter(service.served_names()), model_name)
        return Response(page.render(name), headers={"content-type": CONTENT_TYPE})

    probe = openapi.operation(types.Readiness)
    probe["responses"]["503"] = {**probe["responses"]["200"], "description": "Not ready"}
    for path, route, extra in (
        ("/health", health, probe),
        ("/live", health, probe),
        ("/ping", health, probe),
        ("/ready", ready, probe),
        ("/version", tell_version, openapi.operation(types.Version)),
        ("/metrics", metrics, openapi.operation(None)),
    ):
        name = path.strip("/")
        app.add_api_route(path, route, methods=["GET"], name=name, openapi_extra=extra)
        app.add_api_route(path, route, methods=["HEAD"], name=f"{name}_head", include_in_schema=False)


def _add_admin_routes(app: Api, service: Service) -> None:
    @app.post("/admin/reload", openapi_extra=openapi.operation(types.Reloaded, errors=(400, 401, 403)))
    async def reload() -> Response:
        """Read keys and limits again, as SIGHUP does."""
        try:
            return _json(types.Reloaded(changed=await service.reload()))
        except ConfigError as error:
            raise bad_request(str(error), code="configuration_error") from None

    @app.post("/admin/drain", openapi_extra=openapi.operation(types.Readiness, errors=(401, 403)))
    async def drain() -> Response:
        """Take nothing new, finish what runs, and end, as SIGTERM does."""
        service.end_server()
        return _json(types.Readiness(status="draining", detail="", fraction=1.0), 202)


def _json(body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(body), status, headers, media_type="application/json")
