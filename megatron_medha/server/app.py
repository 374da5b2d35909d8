"""The HTTP application: routes over one engine, and running it on uvicorn."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from megatron_medha.core.errors import ConfigError
from megatron_medha.engine.ports import EngineClient, EnginePhase
from megatron_medha.server import chat, completion, errors, openapi, tokenize
from megatron_medha.server import openai_types as types
from megatron_medha.server.answer import Answer
from megatron_medha.server.config import ServerConfig
from megatron_medha.server.front_door import FrontDoor
from megatron_medha.server.generation import GenerationSpec
from megatron_medha.server.metrics import Metrics
from megatron_medha.server.metrics_page import CONTENT_TYPE, MetricsPage
from megatron_medha.server.request_fields import decode_body, read_body, read_slo
from megatron_medha.server.service import Ready, Service
from megatron_medha.server.tokens import Tokenizer
from megatron_medha.server.wire_format import WireFormat, encode_json

BODY_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503)


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer | Future[Tokenizer],
    config: ServerConfig,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The application. It starts the engine when it starts, and stops it when it stops.

    metrics: the one that observes the engine; without it, step metrics stay empty.
    """
    metrics = Metrics() if metrics is None else metrics
    service = Service(engine, tokenizer, config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
        except Exception as error:
            app.state.startup_error = error  # uvicorn logs it and forgets it; run() raises it
            raise
        yield
        await service.stop()

    app = FastAPI(title="megatron_medha", version=package_version(), lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.state.startup_error = None
    errors.install(app)
    app.add_middleware(FrontDoor, service=service)
    _add_generation_routes(app, service)
    _add_token_routes(app, service)
    _add_model_routes(app, service)
    _add_probe_routes(app, service, MetricsPage(metrics, engine))
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def run(app: FastAPI, config: ServerConfig, on_listening: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; on_listening is told the base URL. ConfigError if the port is taken."""
    listener = bind(config)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    class Server(uvicorn.Server):
        """Says when it listens."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started and on_listening is not None:
                on_listening(url)

    try:
        Server(uvicorn_config(app, config)).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again after it has shut down; by then all is done
    except SystemExit:
        if app.state.startup_error is None:
            raise
    finally:
        listener.close()
    if app.state.startup_error is not None:
        raise app.state.startup_error


def bind(config: ServerConfig) -> socket.socket:
    """A socket on the configured address, before anything slow is started; ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        # Another listener with SO_REUSEADDR shows only here.
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        listener.close()
        raise ConfigError(
            f"server.host={config.host} server.port={config.port} cannot be listened on ({error}); "
            f"choose another server.port, or end what uses it"
        ) from error
    return listener


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn runs the app; uvloop and httptools are used where they are installed."""
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.keepalive_timeout_s,
        timeout_graceful_shutdown=config.drain_timeout_s,
    )


def package_version() -> str:
    """Of the installed package."""
    try:
        return version("megatron_medha")
    except PackageNotFoundError:
        return "0+unknown"


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    def answer(ready: Ready, spec: GenerationSpec, wire: WireFormat) -> Answer:
        service.metrics.answer_began(spec)
        return Answer(
            spec,
            wire,
            engine=service.engine,
            tokenizer=ready.tokenizer,
            streams=service.streams,
            metrics=service.metrics,
            config=service.config,
        )

    @app.post("/v1/completions", openapi_extra=openapi.operation(
        types.CompletionAnswer, body=types.CompletionRequest, errors=BODY_ERRORS, has_events=True))
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        raw = await read_body(request, service.config)
        arrival_s = service.engine.now_s()
        ready = service.ready()
        body = decode_body(raw, completion.DECODER)
        spec = await completion.plan_completion(service, ready, body, read_slo(request.headers), arrival_s)
        return answer(ready, spec, completion.CompletionFormat(spec, ready.tokenizer))

    @app.post("/v1/chat/completions", openapi_extra=openapi.operation(
        types.ChatAnswer, body=types.ChatRequest, errors=BODY_ERRORS, has_events=True))
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        raw = await read_body(request, service.config)
        arrival_s = service.engine.now_s()
        ready = service.ready()
        body = decode_body(raw, chat.DECODER)
        spec = await chat.plan_chat(service, ready, body, read_slo(request.headers), arrival_s)
        return answer(ready, spec, chat.ChatFormat(spec, ready.tokenizer))


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=openapi.operation(
        types.TokenizeAnswer, body=types.TokenizeRequest, errors=BODY_ERRORS))
    async def tokenize_text(request: Request) -> Response:
        """Token ids of a prompt or of messages."""
        raw = await read_body(request, service.config)
        ready = service.ready()
        return _json(await tokenize.tokenize(service, ready, decode_body(raw, tokenize.TOKENIZE_DECODER)))

    @app.post("/detokenize", openapi_extra=openapi.operation(
        types.DetokenizeAnswer, body=types.DetokenizeRequest, errors=BODY_ERRORS))
    async def detokenize_ids(request: Request) -> Response:
        """Text of token ids."""
        raw = await read_body(request, service.config)
        ready = service.ready()
        return _json(await tokenize.detokenize(service, ready, decode_body(raw, tokenize.DETOKENIZE_DECODER)))


def _add_model_routes(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> types.Model:
        facts = service.engine.facts
        return types.Model(
            id=name,
            created=service.started_unix_s,
            root=facts.shape.name if facts is not None else name,
            max_model_len=facts.max_request_tokens if facts is not None else None,
        )

    @app.get("/v1/models", openapi_extra=openapi.operation(types.ModelList, errors=(401,)))
    async def models() -> Response:
        """The models that are served."""
        return _json(types.ModelList(data=[describe(name) for name in service.served_names()]))

    @app.get("/v1/models/{name:path}", openapi_extra=openapi.operation(types.Model, errors=(401, 404)))
    async def model(name: str) -> Response:
        """One of them."""
        return _json(describe(service.model_name(name)))


def _add_probe_routes(app: FastAPI, service: Service, page: MetricsPage) -> None:
    def readiness() -> types.Readiness:
        status = service.status
        return types.Readiness(status=status.phase.value, detail=status.detail, fraction=status.fraction)

    async def health() -> Response:
        """200 while the process lives and the engine has not failed."""
        has_failed = service.status.phase is EnginePhase.FAILED
        return _json(readiness(), 503 if has_failed else 200)

    async def ready() -> Response:
        """200 once requests are taken; until then 503, saying how far loading is."""
        is_ready = service.status.phase is EnginePhase.READY
        headers = {} if is_ready else {"retry-after": str(service.config.retry_after_s)}
        return _json(readiness(), 200 if is_ready else 503, headers)

    async def tell_version() -> Response:
        """Of this server."""
        return _json(types.Version(version=package_version()))

    async def metrics() -> Response:
        """Prometheus' text format."""
        names = service.served_names()
        return Response(page.render(names[0] if names else ""), headers={"content-type": CONTENT_TYPE})

    probe = openapi.operation(types.Readiness)
    probe["responses"]["503"] = {**probe["responses"]["200"], "description": "Not ready"}
    for path, route, extra in (
        ("/health", health, probe),
        ("/ping", health, probe),
        ("/ready", ready, probe),
        ("/version", tell_version, openapi.operation(types.Version)),
        ("/metrics", metrics, openapi.operation(None)),
    ):
        name = path.strip("/")
        app.add_api_route(path, route, methods=["GET"], name=name, openapi_extra=extra)
        app.add_api_route(path, route, methods=["HEAD"], name=f"{name}_head", include_in_schema=False)


def _json(body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(body), status, headers, media_type="application/json")


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(openapi.components())
        app.openapi_schema = schema
    return app.openapi_schema
