"""Plays sessions against a server: each turn is sent with the answers that came before it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import inf

from megatron_medha.bench.client import completion_body, run_completion
from megatron_medha.bench.load_generator import LoadClient
from megatron_medha.bench.session_prompts import PromptMaker, SessionPrompts
from megatron_medha.bench.turn_table import SentTurn
from megatron_medha.core.request import Request
from megatron_medha.stats.request_stats import Ending
from megatron_medha.workload.session_play import SessionPlay


async def session_loop(
    client: LoadClient, play: SessionPlay, maker: PromptMaker, note: Callable[[SentTurn], None]
) -> None:
    """Send every turn when it is due, which depends on when those before it have ended."""
    prompts = SessionPrompts(maker)
    start_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:  # the first that raises, which is our own fault, ends all

        async def send(request: Request) -> None:
            session, turn = play.session_of(request.request_id), play.turn(request.request_id)
            number = session.turns.index(turn) + 1
            # Who returns ids of tokens takes fields that are not OpenAI's; others may refuse them.
            ends = {"ends_session": True} if request.ends_session and maker.fields else {}
            body = completion_body(
                client.target, client.model, prompts.prompt(session, turn), turn.num_output_tokens,
                {**maker.fields, **ends},
            )  # fmt: skip
            headers = {"X-Session-Id": request.session_id} if request.session_id else {}
            await asyncio.sleep(start_s + request.arrival_s - time.monotonic())
            streamed = await run_completion(client.target, client.session, body, turn.num_output_tokens, headers)
            sent = client.sent(request, streamed, start_s)
            is_finished = sent.outcome.ending is Ending.FINISHED
            if is_finished:
                prompts.answered(session, streamed)
            note(SentTurn(session.name, number, turn.num_new_tokens, sent))
            play.ended(request.request_id, time.monotonic() - start_s, is_finished)
            send_due()

        def send_due() -> None:
            # Before they are due: a prompt of a million ids takes most of a second to build.
            while play.next_s < inf:
                tasks.create_task(send(play.pop()))

        send_due()
