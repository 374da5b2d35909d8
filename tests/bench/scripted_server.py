"""A server whose answers are scripted: what a client does with them is all that is tested."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Event = dict[str, Any] | str


def token(text: str = "x", finish_reason: str | None = None) -> Event:
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}


def usage(num_tokens: int) -> Event:
    return {"choices": [], "usage": {"completion_tokens": num_tokens}}


@dataclass
class ScriptedServer:
    """Answers every completion with the same events, with those that its body asks for, or with an error."""

    events: Sequence[Event] = ()
    answer: Callable[[dict[str, Any]], Sequence[Event]] | None = None
    status: int = 200
    error: Any = None
    models: Any = field(default_factory=lambda: {"data": [{"id": "scripted"}]})
    holds: asyncio.Event | None = None                    # no answer before it is set
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            if self.holds is not None:
                await self.holds.wait()
            if self.status != 200:
                return web.json_response(self.error, status=self.status)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for event in self.events if self.answer is None else self.answer(self.bodies[-1]):
                data = event if isinstance(event, str) else json.dumps(event)
                await response.write(f"data: {data}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.num_at_once -= 1

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{port}"
            yield self
        finally:
            if self.holds is not None:
                self.holds.set()
            await runner.cleanup()
