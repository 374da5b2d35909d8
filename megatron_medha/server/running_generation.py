"""One admitted generation: its sub-requests go to the engine, their tokens come back as pieces. No protocol here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from megatron_medha.core.ports import ErrorDelivery
from megatron_medha.core.request import Rejection, Request
from megatron_medha.server.admission import AdmissionTicket
from megatron_medha.server.generation import Choice, GenerationSpec, Piece
from megatron_medha.server.http.http_errors import ApiError, rejected
from megatron_medha.server.output_streams import EngineLost, OutputStream
from megatron_medha.server.service import Service
from megatron_medha.server.session_history import SessionSequence
from megatron_medha.text.tokenizer import Tokenizer

# Steps whose tokens one request may have unread, however small server.max_buffered_tokens is: a step brings a token of
# every choice at once.
UNREAD_STEPS = 16
_SUBMITTED_IDS = 100_000  # that choices get copies of before others run: 0.1 ms
_SUBMITTED = 64           # choices before that: some 3 ms


class RunningGeneration:
    """The choices of one request while they grow. After open() comes close(), and no sub-request outlives that."""

    def __init__(self, spec: GenerationSpec, service: Service, tokenizer: Tokenizer, ticket: AdmissionTicket) -> None:
        self.spec = spec
        self.choices = [Choice(spec, index, tokenizer) for index in range(spec.num_choices)]
        self.num_open = spec.num_choices
        self.first_token_s: float | None = None
        self.live_ids: set[str] = set()  # in the engine
        self._service = service
        self._engine = service.engine
        self._streams = service.streams
        self._metrics = service.metrics
        self._max_buffered_tokens = service.config.max_buffered_tokens
        self._ticket = ticket
        self._choice_by_id = {spec.request_id(choice.index): choice for choice in self.choices}
        self._stream: OutputStream | None = None
        self._in_session: dict[str, SessionSequence] = {}  # what is kept of sub-requests that belong to one

    def open(self) -> OutputStream:
        """Listen to the engine; before submit()."""
        max_unread = max(self._max_buffered_tokens, UNREAD_STEPS * self.spec.num_choices)
        self._stream = self._streams.open(tuple(self._choice_by_id), max_unread, self._abort_live)
        return self._stream

    async def submit(self) -> None:
        """Hand every choice to the engine."""
        requests = self._within_session()
        for number, choice in enumerate(self.choices, start=1):
            request, token_ids = requests[choice.index], choice.prompt.token_ids
            keys = None if choice.prompt.keys is None else choice.prompt.keys.copy()
            self.live_ids.add(request.request_id)
            self._engine.submit(request, token_ids, self.spec.sampling_of(choice.index), keys)
            if len(token_ids) > _SUBMITTED_IDS or number % _SUBMITTED == 0:
                await asyncio.sleep(0)

    async def next_piece(self) -> Piece:
        """The next token of any choice; ApiError where a sub-request, and so the whole response, fails."""
        assert self._stream is not None, "open() comes first"
        try:
            delivery, at_s = await self._stream.next()
        except EngineLost as error:
            raise ApiError(500, str(error), code="engine_failed") from error
        request_id = delivery.request_id
        if isinstance(delivery, ErrorDelivery):
            self.live_ids.discard(request_id)
            if delivery.is_client_fault:
                raise rejected(Rejection(reason="request_rejected", message=delivery.message))
            raise ApiError(500, delivery.message, code="engine_failed")
        choice = self._choice_by_id[request_id]
        if (sequence := self._in_session.get(request_id)) is not None:
            self._service.sessions.extend(sequence, delivery.token_id)
        piece = choice.take(delivery)
        if choice.last_token_s is None:
            choice.first_token_s = at_s
            if self.first_token_s is None:
                self.first_token_s = at_s
            self._ticket.first_token(choice.index)
            self._metrics.first_token(self.spec, at_s)
            self._metrics.num_prompt_tokens += len(choice.prompt.token_ids)
        else:
            self._metrics.next_token(at_s - choice.last_token_s, at_s)
        choice.last_token_s = at_s
        if piece.finish_reason is not None:
            self._finish(choice, request_id, is_engine_done=delivery.finish_reason is not None)
        return piece

    def cut_off(self, outcome: str, reason: str, num_choices: int) -> None:
        """Count that it ends before its time: why, as `reason` for so many choices."""
        for request_id, choice in self._choice_by_id.items():
            if choice.first_token_s is None:
                self._metrics.num_prompt_tokens += self._service.journal.num_computed_prompt_tokens(request_id)
        self._metrics.num_ended[reason] += num_choices
        self._metrics.num_cut_off[outcome] += 1

    def close(self) -> None:
        """It is over, however it went: what still runs is aborted."""
        if self._stream is not None:
            self._streams.close(self._stream)
        self._abort_live()
        self._ticket.close(sum(choice.num_tokens for choice in self.choices))

    def _within_session(self) -> Sequence[Request]:
        """The sub-requests, with what each shares with its session."""
        spec, sessions, requests = self.spec, self._service.sessions, self._ticket.requests
        if not spec.session_id or spec.prefix_root is None:
            return requests
        of_prompt = [sessions.num_shared_tokens(spec.session_id, prompt.token_ids) for prompt in spec.prompts]
        if spec.ends_session:
            sessions.forget(spec.session_id)
        else:
            for choice, request in zip(self.choices, requests, strict=True):
                self._in_session[request.request_id] = sessions.add(spec.session_id, choice.prompt.token_ids)
        return [replace(one, num_session_tokens=of_prompt[place // spec.n]) for place, one in enumerate(requests)]

    def _abort_live(self) -> None:
        for request_id in self.live_ids:
            self._engine.abort(request_id)
        self.live_ids.clear()

    def _finish(self, choice: Choice, request_id: str, *, is_engine_done: bool) -> None:
        self.num_open -= 1
        self.live_ids.discard(request_id)
        self._streams.forget(request_id)
        if not is_engine_done:
            self._engine.abort(request_id)
        self._metrics.choice_finished(self.spec, choice)
