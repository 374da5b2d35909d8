"""The HTTP application: routes over one engine. Running it is run_server.py's part."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from megatron_medha.core.ports import EngineClient
from megatron_medha.server.http import http_errors
from megatron_medha.server.http.routing import Api
from megatron_medha.server.observe.metrics import Metrics
from megatron_medha.server.observe.metrics_page import MetricsPage
from megatron_medha.server.observe.request_log import RequestLog
from megatron_medha.server.observe.tracing import OtelTraces
from megatron_medha.server.routes import body_routes, debug_routes, openapi, service_routes
from megatron_medha.server.routes.auth import AuthMiddleware
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.server.slo import SloConfig
from megatron_medha.text.sampling_defaults import OPENAI_DEFAULTS, SamplingDefaults
from megatron_medha.text.template_renders import TemplateProcessPool
from megatron_medha.text.tokenizer import Tokenizer


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer | Future[Tokenizer],
    config: ServerConfig,
    metrics: Metrics | None = None,
    *,
    journal: RequestLog | None = None,
    slo: SloConfig | None = None,
    read_config: Callable[[], ServerConfig] | None = None,
    traces: OtelTraces | None = None,
    model_name: str = "",
    renders: TemplateProcessPool | None = None,
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
        journal=RequestLog(metrics) if journal is None else journal,
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
        title="megatron_medha", version=service_routes.package_version(), lifespan=lifespan,
        components=openapi.components,
    )  # fmt: skip
    app.state.service = service
    app.state.startup_error = None
    http_errors.install(app)
    app.add_middleware(AuthMiddleware, service=service)
    page = MetricsPage(metrics, engine, service.admission, service.slo.names)
    body_routes.add_generating_routes(app, service)
    body_routes.add_token_routes(app, service)
    service_routes.add_model_routes(app, service)
    service_routes.add_probe_routes(app, service, page, model_name)
    service_routes.add_admin_routes(app, service)
    debug_routes.add_routes(app, service)
    return app
