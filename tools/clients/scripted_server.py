"""Our HTTP application over the scripted engine of the tests: agents get calls of their tools, and then a last word.

    python tools/clients/scripted_server.py 8000 [transcript.jsonl]

Agents need a model that calls tools, and the tiny checkpoint's output is gibberish. Engine, tokenizer (bytes) and chat
template are of tests/server/scripted_model.py; everything else is the server as it is. The transcript has a line for
each request: what came, the status, and the ids of items and calls that the answer had.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "server"))

import uvicorn  # noqa: E402
from scripted_model import MODEL, scripted_engine, scripted_tokenizer  # noqa: E402

from megatron_medha.server.app import create_app  # noqa: E402
from megatron_medha.server.run_server import uvicorn_config  # noqa: E402
from megatron_medha.server.server_config import ServerConfig  # noqa: E402
from megatron_medha.server.service import Service  # noqa: E402

OUR_ID = re.compile(rb"\b(?:msg|fc|ctc|call)_[0-9a-f]{24,32}\b")

Event = MutableMapping[str, Any]


class Recorder:
    """Passes requests on, and writes each down as a line of JSON."""

    def __init__(self, app: Any, file: Path) -> None:
        self._app = app
        self._file = file

    async def __call__(
        self, scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        """The ASGI application."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        came, went = bytearray(), bytearray()
        status = 0

        async def receive_and_keep() -> Event:
            event = await receive()
            came.extend(event.get("body", b""))
            return event

        async def send_and_keep(event: Event) -> None:
            nonlocal status
            status = event.get("status", status)
            went.extend(event.get("body", b""))
            await send(event)

        await self._app(scope, receive_and_keep, send_and_keep)
        line = {
            "method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode(),
            "headers": sorted(name.decode() for name, _ in scope["headers"]), "status": status,
            "body": json.loads(came) if came else None,
            "ids": list(dict.fromkeys(one.decode() for one in OUR_ID.findall(went))),
        }  # fmt: skip
        with self._file.open("a", encoding="utf-8") as output:
            print(json.dumps(line), file=output)


def main() -> None:
    """Serves until it is interrupted."""
    config = ServerConfig(port=int(sys.argv[1]), served_model_names=(MODEL,), drain_timeout_s=0)
    with tempfile.TemporaryDirectory() as directory:
        app = create_app(Service(scripted_engine(), scripted_tokenizer(Path(directory)), config))
        settings = uvicorn_config(app, config)
        if len(sys.argv) > 2:
            settings.app = Recorder(app, Path(sys.argv[2]))
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
            uvicorn.Server(settings).run()


if __name__ == "__main__":
    main()
