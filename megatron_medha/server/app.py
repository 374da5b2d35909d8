"""The HTTP application: routes over one Service. Running it is run_server.py's part."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from megatron_medha.server.http import http_errors
from megatron_medha.server.http.routing import Api
from megatron_medha.server.observe.metrics_page import MetricsPage
from megatron_medha.server.routes import body_routes, debug_routes, service_routes
from megatron_medha.server.routes.auth import AuthMiddleware
from megatron_medha.server.service import Service


def create_app(service: Service, model_name: str = "") -> Api:
    """The application. It starts the service's engine when it starts, and stops it when it stops.

    model_name: on metrics, until the checkpoint's own name is known.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await service.start()
        except Exception as error:
            app.state.startup_error = error  # uvicorn logs it and forgets it; run() raises it
            raise
        yield
        await service.stop()

    app = Api(title="megatron_medha", version=service_routes.package_version(), lifespan=lifespan)
    app.state.service = service
    app.state.startup_error = None
    http_errors.install(app)
    app.add_middleware(AuthMiddleware, service=service)
    page = MetricsPage(service.metrics, service.engine, service.admission, service.slo.names)
    body_routes.add_generating_routes(app, service)
    body_routes.add_token_routes(app, service)
    service_routes.add_model_routes(app, service)
    service_routes.add_probe_routes(app, service, page, model_name)
    service_routes.add_admin_routes(app, service)
    debug_routes.add_routes(app, service)
    return app
