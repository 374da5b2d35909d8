"""The routes of an application, and what /openapi.json says of them.

Starlette, and the little of FastAPI that we would use: importing that one costs a third of the time until the server
listens, for checks of bodies that msgspec does here.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Lifespan

Route = Callable[..., Awaitable[Response]]

OPENAPI_VERSION = "3.1.0"
_PATH_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td{padding:.3em 1em .3em 0;" \
    "vertical-align:top}code{white-space:nowrap}"
_DOCS_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


@dataclass(frozen=True, slots=True)
class _Described:
    path: str
    method: str
    operation: dict[str, Any]


class Api(Starlette):
    """An application whose routes are added by decorators, each with its OpenAPI operation."""

    def __init__(
        self, *, title: str, version: str, lifespan: Lifespan[Starlette], components: Callable[[], dict[str, Any]]
    ) -> None:
        """components: the schemas that operations refer to, by name; called when somebody first asks."""
        super().__init__(lifespan=lifespan)
        self.title = title
        self.version = version
        self._components = components
        self._described: list[_Described] = []
        self._schema: dict[str, Any] | None = None
        self.add_api_route("/openapi.json", self._answer_schema, methods=["GET"], include_in_schema=False)
        self.add_api_route("/docs", self._answer_docs, methods=["GET"], include_in_schema=False)

    def get(self, path: str, **options: Any) -> Callable[[Route], Route]:
        """Decorates what answers GET; options as of add_api_route()."""
        return self._adder(path, "GET", options)

    def post(self, path: str, **options: Any) -> Callable[[Route], Route]:
        """Decorates what answers POST; options as of add_api_route()."""
        return self._adder(path, "POST", options)

    def delete(self, path: str, **options: Any) -> Callable[[Route], Route]:
        """Decorates what answers DELETE; options as of add_api_route()."""
        return self._adder(path, "DELETE", options)

    def add_api_route(
        self,
        path: str,
        route: Route,
        *,
        methods: Sequence[str],
        name: str | None = None,
        openapi_extra: dict[str, Any] | None = None,
        include_in_schema: bool = True,
    ) -> None:
        """Let `route` answer these methods. It takes nothing, or the Request and parameters of the path by name."""
        self.router.add_route(path, _endpoint(route), list(methods), name or route.__name__)
        if include_in_schema:
            for method in methods:
                operation = _describe(path, method, name or route.__name__, route.__doc__ or "")
                self._described.append(_Described(path, method, {**operation, **(openapi_extra or {})}))

    def openapi(self) -> dict[str, Any]:
        """What /openapi.json answers."""
        if self._schema is None:
            paths: dict[str, dict[str, Any]] = {}
            for one in self._described:
                paths.setdefault(_PATH_PARAMETER.sub(r"{\1}", one.path), {})[one.method.lower()] = one.operation
            self._schema = {
                "openapi": OPENAPI_VERSION,
                "info": {"title": self.title, "version": self.version},
                "paths": paths,
                "components": {"schemas": self._components()},
            }
        return self._schema

    async def _answer_schema(self) -> Response:
        """The description of all routes."""
        return Response(msgspec.json.encode(self.openapi()), media_type="application/json")

    async def _answer_docs(self) -> Response:
        """All routes on a page without any script or outside asset."""
        rows = [
            f"<tr><td>{one.method}</td><td><code>{html.escape(one.path)}</code></td>"
            f"<td>{html.escape(' '.join(one.operation['description'].split()))}</td></tr>"
            for one in self._described
        ]
        page = (
            f"<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{html.escape(self.title)}</title>"
            f"<style>{_STYLE}</style></head><body><h1>{html.escape(self.title)} {html.escape(self.version)}</h1>"
            f"<p>The fields of bodies are in <a href=\"openapi.json\">openapi.json</a>, for any OpenAPI viewer.</p>"
            f"<table>{''.join(rows)}</table></body></html>"
        )
        return Response(page, headers=_DOCS_HEADERS, media_type="text/html")

    def _adder(self, path: str, method: str, options: dict[str, Any]) -> Callable[[Route], Route]:
        def add(route: Route) -> Route:
            self.add_api_route(path, route, methods=[method], **options)
            return route

        return add


def _endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
    """As Starlette calls it: with the request alone."""
    names = tuple(inspect.signature(route).parameters)

    async def answer(request: Request) -> Response:
        return await route(*(request if name == "request" else request.path_params[name] for name in names))

    return answer


def _describe(path: str, method: str, name: str, docstring: str) -> dict[str, Any]:
    words = name.replace("_", " ")
    operation: dict[str, Any] = {
        "summary": words.capitalize(),
        "description": inspect.cleandoc(docstring),
        "operationId": f"{name}_{method.lower()}",
    }
    if names := _PATH_PARAMETER.findall(path):
        operation["parameters"] = [
            {"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in names
        ]
    return operation
