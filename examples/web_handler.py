"""A model inside a web application of your own: python examples/web_handler.py CHECKPOINT

    curl -N 'http://127.0.0.1:8080/story?about=queues'
"""

import contextlib
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from megatron_medha import AsyncLLM, SamplingParams

PARAMS = SamplingParams(max_tokens=100, temperature=0.7)


def make_app(checkpoint: str) -> Starlette:
    """The application; the model loads when it starts, and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncLLM(checkpoint) as app.state.llm:
            yield

    async def story(request: Request) -> StreamingResponse:
        prompt = f"A story about {request.query_params['about']}:"

        async def text() -> AsyncIterator[str]:
            # When the client disconnects, this generator is closed, and the request ends.
            async for new in request.app.state.llm.stream(prompt, PARAMS):
                yield new.text

        return StreamingResponse(text(), media_type="text/plain")

    return Starlette(routes=[Route("/story", story)], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=8080)
