"""A request's output while its tokens come in."""

from __future__ import annotations

import time

from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.python_api.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from megatron_medha.python_api.sampling_params import SamplingParams
from megatron_medha.server.generation import Piece
from megatron_medha.server.running_generation import RunningGeneration
from megatron_medha.server.service import Service
from megatron_medha.text.tokenizer import Tokenizer


class GrowingOutput:
    """Collects pieces; what they have come to can be had at any time."""

    def __init__(
        self, generation: RunningGeneration, service: Service, tokenizer: Tokenizer, params: SamplingParams, name: str
    ) -> None:
        """name: of the request, for the user."""
        self._generation = generation
        self._service = service
        self._params = params
        self._name = name
        self._token_name = tokenizer.token_name
        self._texts: list[list[str]] = [[] for _ in generation.choices]
        self._outputs = [
            CompletionOutput(
                index, "", [],
                cumulative_logprob=None if params.logprobs is None else 0.0,
                logprobs=None if params.logprobs is None else [],
            )
            for index, _ in enumerate(generation.choices)
        ]  # fmt: skip
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None

    def add(self, piece: Piece) -> CompletionOutput:
        """Take a piece; what is new by it."""
        if piece.prompt_logprobs is not None and self._params.prompt_logprobs is not None:
            num = self._params.prompt_logprobs
            self._prompt_logprobs = [None, *(self._position(one, num) for one in piece.prompt_logprobs)]
        new = CompletionOutput(
            piece.choice_index, piece.text, [] if piece.token_id is None else [piece.token_id],
            finish_reason=piece.finish_reason, stop_reason=piece.stop_reason,
        )  # fmt: skip
        whole = self._outputs[piece.choice_index]
        self._texts[piece.choice_index].append(piece.text)
        whole.token_ids += new.token_ids
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        if piece.logprobs is not None and self._params.logprobs is not None:
            new.logprobs = [self._position(piece.logprobs, self._params.logprobs)]
            new.cumulative_logprob = piece.logprobs.logprob
            assert whole.logprobs is not None and whole.cumulative_logprob is not None
            whole.logprobs += new.logprobs
            whole.cumulative_logprob += piece.logprobs.logprob
        return new

    def output(self) -> RequestOutput:
        """All of it so far; later pieces do not change it."""
        generation = self._generation
        outputs = []
        for texts, output in zip(self._texts, self._outputs, strict=True):
            output.text += "".join(texts)
            texts.clear()
            outputs.append(
                CompletionOutput(
                    output.index, output.text, list(output.token_ids), output.cumulative_logprob,
                    None if output.logprobs is None else list(output.logprobs),
                    output.finish_reason, output.stop_reason,
                )  # fmt: skip
            )
        return RequestOutput(
            request_id=self._name,
            prompt=generation.spec.prompts[0].text,
            prompt_token_ids=list(generation.spec.prompts[0].token_ids),
            outputs=outputs,
            finished=not generation.num_open,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=min(
                (choice.num_cached_tokens for choice in generation.choices if choice.num_tokens), default=0
            ),
            metrics=self._metrics(),
        )

    def _metrics(self) -> RequestMetrics:
        generation, engine = self._generation, self._service.engine
        # The engine's clock starts anywhere.
        epoch_s = time.time() - engine.now_s()
        trace = self._service.journal.trace(generation.spec.request_id(0))
        scheduled_s = None if trace is None else trace.first_scheduled_s
        last_s = max((choice.last_token_s for choice in generation.choices if choice.last_token_s), default=None)
        return RequestMetrics(
            arrival_time=epoch_s + generation.spec.arrival_s,
            first_scheduled_time=None if scheduled_s is None else epoch_s + scheduled_s,
            first_token_time=None if generation.first_token_s is None else epoch_s + generation.first_token_s,
            last_token_time=None if last_s is None else epoch_s + last_s,
            finished_time=epoch_s + last_s if last_s is not None and not generation.num_open else None,
        )

    def _position(self, logprobs: TokenLogprobs, num_top: int) -> PositionLogprobs:
        name = self._token_name
        found = {logprobs.token_id: Logprob(logprobs.logprob, logprobs.rank, name(logprobs.token_id))}
        for rank, (token_id, logprob) in enumerate(logprobs.top[:num_top], start=1):
            found.setdefault(token_id, Logprob(logprob, rank, name(token_id)))
        return found
