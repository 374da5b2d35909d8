"""Routes about the server itself: models, probes, metrics, reload and drain."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from starlette.requests import Request
from starlette.responses import Response

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.ports import EnginePhase
from megatron_medha.server.bodies import openai_types as types
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.routing import Api, Shape, json_response
from megatron_medha.server.observe.metrics_page import CONTENT_TYPE, MetricsPage
from megatron_medha.server.service import Service


def package_version() -> str:
    """Of the installed package."""
    return _installed("megatron_medha") or "0+unknown"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def add_model_routes(app: Api, service: Service) -> None:
    """Which models are served."""

    def describe(name: str) -> types.Model:
        facts = service.engine.facts
        return types.Model(
            id=name,
            created=service.started_unix_s,
            root=facts.shape.name if facts is not None else name,
            max_model_len=facts.max_request_tokens if facts is not None else None,
            sampling_defaults=service.sampling_defaults,
        )

    @app.get("/v1/models", Shape(answer=types.ModelList, errors=(401,)))
    async def models(_: Request) -> Response:
        """The models that are served."""
        return json_response(types.ModelList(data=[describe(name) for name in service.served_names()]))

    @app.get("/v1/models/{name:path}", Shape(answer=types.Model, errors=(401, 404)))
    async def model(request: Request) -> Response:
        """One of them."""
        return json_response(describe(service.model_name(request.path_params["name"])))


def add_probe_routes(app: Api, service: Service, page: MetricsPage, model_name: str) -> None:
    """For load balancers and Prometheus. model_name: on metrics, until the checkpoint's own name is known."""

    def readiness() -> types.Readiness:
        status = service.status
        phase = "draining" if service.lifecycle.is_draining else status.phase.value
        return types.Readiness(status=phase, detail=status.detail, fraction=status.fraction)

    async def health(_: Request) -> Response:
        """200 while the process lives and the engine has not failed."""
        has_failed = service.status.phase is EnginePhase.FAILED
        return json_response(readiness(), 503 if has_failed else 200)

    async def ready(_: Request) -> Response:
        """200 once requests are taken; until then 503, saying how far loading is."""
        is_ready = service.status.phase is EnginePhase.READY and not service.lifecycle.is_draining
        headers = {} if is_ready else {"retry-after": str(service.config.retry_after_s)}
        return json_response(readiness(), 200 if is_ready else 503, headers)

    async def tell_version(_: Request) -> Response:
        """Of this server."""
        facts = service.engine.facts
        return json_response(
            types.Version(
                version=package_version(),
                torch=_installed("torch"),
                device=facts.device if facts is not None else None,
            )
        )

    async def metrics(_: Request) -> Response:
        """Prometheus' text format."""
        name = next(iter(service.served_names()), model_name)
        return Response(page.render(name), headers={"content-type": CONTENT_TYPE})

    probe = Shape(answer=types.Readiness, errors=(503,), error=types.Readiness, error_text="Not ready")
    for path, route, shape in (
        ("/health", health, probe),
        ("/live", health, probe),
        ("/ping", health, probe),
        ("/ready", ready, probe),
        ("/version", tell_version, Shape(answer=types.Version)),
        ("/metrics", metrics, Shape()),
    ):
        name = path.strip("/")
        app.add_api_route(path, "GET", shape, route, name)
        app.add_api_route(path, "HEAD", None, route, f"{name}_head")


def add_admin_routes(app: Api, service: Service) -> None:
    """Reload and drain, for those with the admin key."""

    @app.post("/admin/reload", Shape(answer=types.Reloaded, errors=(400, 401, 403)))
    async def reload(_: Request) -> Response:
        """Read keys and limits again, as SIGHUP does."""
        try:
            return json_response(types.Reloaded(changed=await service.reload()))
        except ConfigError as error:
            raise bad_request(str(error), code="configuration_error") from None

    @app.post("/admin/drain", Shape(answer=types.Readiness, errors=(401, 403)))
    async def drain(_: Request) -> Response:
        """Take nothing new, finish what runs, and end, as SIGTERM does."""
        service.lifecycle.end_server()
        return json_response(types.Readiness(status="draining", detail="", fraction=1.0), 202)
