"""The routes of an application, and what /openapi.json says of them.

Starlette, and the little of FastAPI that we would use: importing that one costs a third of the time until the server
listens, for checks of bodies that msgspec does here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Lifespan

from megatron_medha.server.http.http_errors import ErrorResponse

Route = Callable[[Request], Awaitable[Response]]

encode_json = msgspec.json.Encoder().encode

OPENAPI_VERSION = "3.1.0"
_REF_TEMPLATE = "#/components/schemas/{name}"
_PATH_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td{padding:.3em 1em .3em 0;" \
    "vertical-align:top}code{white-space:nowrap}"
_DOCS_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A complete JSON response."""
    return Response(encode_json(body), status, headers, media_type="application/json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a route takes and gives, as types whose schemas msgspec knows."""

    answer: type | None = None  # None: text
    body: type | None = None
    errors: tuple[int, ...] = ()
    error: type = ErrorResponse
    error_text: str = "Error"
    has_events: bool = False

    def operation(self) -> dict[str, Any]:
        """As OpenAPI has it."""
        content = {"text/plain": {}} if self.answer is None else _json_of(self.answer)
        if self.has_events:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        responses = {"200": {"description": "OK", "content": content}}
        for status in self.errors:
            responses[str(status)] = {"description": self.error_text, "content": _json_of(self.error)}
        body = {} if self.body is None else {"requestBody": {"required": True, "content": _json_of(self.body)}}
        return {"responses": responses, **body}

    def types(self) -> list[type]:
        """All that it names."""
        return [one for one in (self.answer, self.body, self.error if self.errors else None) if one is not None]


class Api(Starlette):
    """An application whose routes say what they take and give."""

    def __init__(self, *, title: str, version: str, lifespan: Lifespan[Starlette]) -> None:
        super().__init__(lifespan=lifespan)
        self.title = title
        self.version = version
        self._paths: dict[str, dict[str, dict[str, Any]]] = {}  # of /openapi.json: operations by path and method
        self._types: dict[type, None] = {}
        self.add_api_route("/openapi.json", "GET", None, self._answer_schema)
        self.add_api_route("/docs", "GET", None, self._answer_docs)

    def get(self, path: str, shape: Shape | None = None) -> Callable[[Route], Route]:
        """Decorator: add_api_route() for GET."""
        return partial(self.add_api_route, path, "GET", shape)

    def post(self, path: str, shape: Shape | None = None) -> Callable[[Route], Route]:
        """Decorator: add_api_route() for POST."""
        return partial(self.add_api_route, path, "POST", shape)

    def add_api_route(self, path: str, method: str, shape: Shape | None, route: Route, name: str = "") -> Route:
        """Serve this path and method by `route`. shape: for /openapi.json and /docs; None: in neither."""
        name = name or route.__name__
        self.router.add_route(path, route, [method], name)
        if shape is not None:
            operation = {**_describe(path, method, name, route.__doc__ or ""), **shape.operation()}
            self._paths.setdefault(_PATH_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = operation
            self._types.update(dict.fromkeys(shape.types()))
        return route

    def openapi(self) -> dict[str, Any]:
        """The content of /openapi.json."""
        _, components = msgspec.json.schema_components(self._types, ref_template=_REF_TEMPLATE)
        return {
            "openapi": OPENAPI_VERSION,
            "info": {"title": self.title, "version": self.version},
            "paths": self._paths,
            "components": {"schemas": components},
        }

    async def _answer_schema(self, _: Request) -> Response:
        """The description of all routes."""
        return json_response(self.openapi())

    async def _answer_docs(self, _: Request) -> Response:
        """All routes on a page without any script or outside asset."""
        rows = [
            f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
            f"<td>{html.escape(' '.join(operation['description'].split()))}</td></tr>"
            for path, operations in self._paths.items() for method, operation in operations.items()
        ]
        page = (
            f"<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{html.escape(self.title)}</title>"
            f"<style>{_STYLE}</style></head><body><h1>{html.escape(self.title)} {html.escape(self.version)}</h1>"
            f"<p>The fields of bodies are in <a href=\"openapi.json\">openapi.json</a>, for any OpenAPI viewer.</p>"
            f"<table>{''.join(rows)}</table></body></html>"
        )
        return Response(page, headers=_DOCS_HEADERS, media_type="text/html")


def _json_of(body: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF_TEMPLATE.format(name=body.__name__)}}}


def _describe(path: str, method: str, name: str, docstring: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": name.replace("_", " ").capitalize(),
        "description": cleandoc(docstring),
        "operationId": f"{name}_{method.lower()}",
    }
    if names := _PATH_PARAMETER.findall(path):
        operation["parameters"] = [
            {"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in names
        ]
    return operation
