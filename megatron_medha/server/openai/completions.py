"""/v1/completions: from its body to a GenerationSpec, and from pieces to its JSON."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from megatron_medha.core.sampling import TokenLogprobs
from megatron_medha.server.bodies.openai_types import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    Usage,
)
from megatron_medha.server.generation import GenerationSpec, Piece, Prompt
from megatron_medha.server.http.http_errors import bad_request
from megatron_medha.server.http.request_body import BodyType
from megatron_medha.server.http.routing import encode_json
from megatron_medha.server.openai.build_spec import begin_spec
from megatron_medha.server.openai.openai_logprobs import add_completion_token
from megatron_medha.server.openai.prompts import encode_prompts, split_prompts
from megatron_medha.server.openai.request_fields import RequestContext
from megatron_medha.server.openai.wire_format import MARK, EventTemplate, TokenFormat, as_sliced_json, sse_event
from megatron_medha.server.service import Service
from megatron_medha.text.detokenizer import make_detokenizer
from megatron_medha.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's number; chat takes what fits
BODY = BodyType(msgspec.json.Decoder(CompletionRequest), texts=frozenset({"prompt"}), ids=frozenset({"prompt"}))


async def prepare_completion(service: Service, context: RequestContext, body: CompletionRequest) -> CompletionFormat:
    """Check a request and encode its prompts; ApiError 4xx says what is wrong."""
    return CompletionFormat(await completion_spec(service, context, body), context.ready.tokenizer)


async def completion_spec(
    service: Service, context: RequestContext, body: CompletionRequest, *, keeps_text: bool = False
) -> GenerationSpec:
    """What to generate for a completion; ApiError 4xx says what is wrong. keeps_text: of all prompts."""
    ready = context.ready
    if body.suffix:
        raise bad_request(
            "suffix: filling in between is not supported; put all of the text into the prompt", "suffix",
            "unsupported_parameter",
        )  # fmt: skip
    n = body.n or 1
    raw_prompts = split_prompts(body.prompt)
    spec = await begin_spec(
        service,
        context,
        body,
        id_prefix="cmpl",
        n=n,
        num_drawn=_num_drawn(body, n),
        num_prompts=len(raw_prompts),
        max_tokens=body.max_tokens,
        num_logprobs=body.logprobs,
        is_echo=bool(body.echo),
    )
    prompts = await encode_prompts(
        service,
        ready,
        spec.prefix_root,
        raw_prompts,
        max_tokens=body.max_tokens,
        default_max_tokens=max(_DEFAULT_MAX_TOKENS, spec.sampling.min_output_tokens),
        add_special_tokens=body.add_special_tokens is not False,
        param="prompt",
        keeps_text=keeps_text or spec.is_echo,
    )
    return replace(spec, prompts=prompts)


def _num_drawn(body: CompletionRequest, n: int) -> int:
    if body.best_of is None or body.best_of == n:
        return n
    if body.best_of < n:
        raise bad_request(f"best_of: expected at least n={n}, got {body.best_of}", "best_of")
    if body.stream:
        raise bad_request("best_of: not with stream, since the best is known only in the end", "best_of")
    return body.best_of


def _best(pieces_by_choice: Sequence[Sequence[Piece]], spec: GenerationSpec) -> list[Sequence[Piece]]:
    """Of each prompt's choices those with the highest cumulative log-probability, numbered from 0."""
    best: list[Sequence[Piece]] = []
    for first in range(0, len(pieces_by_choice), spec.n):
        of_prompt = sorted(pieces_by_choice[first : first + spec.n], key=_cumulative_logprob, reverse=True)
        best += of_prompt[: spec.num_answered]
    return [[piece._replace(choice_index=index) for piece in pieces] for index, pieces in enumerate(best)]


def _cumulative_logprob(pieces: Sequence[Piece]) -> float:
    return sum(piece.logprobs.logprob for piece in pieces if piece.logprobs is not None)


class CompletionFormat(TokenFormat):
    """JSON of /v1/completions."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        super().__init__(spec, tokenizer)
        self._template = EventTemplate(spec, self._encode_event([CompletionChoice(index=0, text=MARK)], None))
        self._echo_by_prompt: dict[int, str] = {}

    def opening_events(self) -> Sequence[bytes]:
        """None: the first event brings the first token."""
        return ()

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token; the first one brings the echoed prompt too."""
        is_echo = self.spec.is_echo
        if self._is_plain and piece.finish_reason is None and not (is_echo and piece.is_first):
            return self._template.fill(piece.choice_index, piece.text)
        return self._encode_event([self._choice([piece])], usage)

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The response that is not a stream."""
        if self.spec.num_answered < self.spec.n:
            pieces_by_choice = _best(pieces_by_choice, self.spec)
        return encode_json(self._answer([self._choice(pieces) for pieces in pieces_by_choice], usage))

    def _encode_event(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        with_usage = usage if usage is not None or self.spec.includes_usage else msgspec.UNSET
        return sse_event(self._answer(choices, with_usage))

    def _answer(
        self, choices: list[CompletionChoice], usage: Usage | None | msgspec.UnsetType
    ) -> CompletionResponse:
        spec = self.spec
        return CompletionResponse(
            id=spec.response_id, created=spec.created, model=spec.model, choices=choices, usage=usage
        )

    def _choice(self, pieces: Sequence[Piece]) -> CompletionChoice:
        spec = self.spec
        first, last = pieces[0], pieces[-1]
        prompt_index = first.choice_index // spec.num_answered
        prompt = spec.prompts[prompt_index]
        text = "".join(piece.text for piece in pieces)
        is_begin = spec.is_echo and first.is_first
        echo = self._echo(prompt_index, prompt) if spec.is_echo else ""
        token_ids = [piece.token_id for piece in pieces if piece.token_id is not None]
        return CompletionChoice(
            index=first.choice_index,
            text=echo + text if is_begin else text,
            logprobs=self._logprobs(prompt, pieces, len(echo)) if spec.has_logprobs else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            token_ids=as_sliced_json(token_ids) if spec.returns_token_ids else msgspec.UNSET,
            prompt_token_ids=as_sliced_json(prompt.token_ids) if spec.returns_token_ids and first.is_first
            else msgspec.UNSET,
        )

    def _logprobs(self, prompt: Prompt, pieces: Sequence[Piece], num_echo_chars: int) -> CompletionLogprobs:
        lists = CompletionLogprobs([], [], [], [])
        if self.spec.is_echo and pieces[0].is_first:
            self._add_prompt(lists, prompt.token_ids, pieces[0].prompt_logprobs or ())
        for piece in pieces:
            if piece.token_id is not None:
                offset = num_echo_chars + piece.text_offset
                add_completion_token(lists, piece.token_id, piece.logprobs, offset, self._name)
        return CompletionLogprobs(
            as_sliced_json(lists.tokens), as_sliced_json(lists.token_logprobs), as_sliced_json(lists.top_logprobs),
            as_sliced_json(lists.text_offset),
        )  # fmt: skip

    def _add_prompt(self, lists: CompletionLogprobs, token_ids: array[int], known: Sequence[TokenLogprobs]) -> None:
        detokenizer = make_detokenizer(self._tokenizer, (), skip_special_tokens=self.spec.skips_special_tokens)
        num_chars = 0
        for position, token_id in enumerate(token_ids):
            logprobs = known[position - 1] if 0 < position <= len(known) else None
            add_completion_token(lists, token_id, logprobs, num_chars, self._name)
            num_chars += len(detokenizer.push(token_id))

    def _echo(self, prompt_index: int, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if prompt_index not in self._echo_by_prompt:
            self._echo_by_prompt[prompt_index] = self._tokenizer.decode(
                prompt.token_ids, skip_special_tokens=self.spec.skips_special_tokens
            )
        return self._echo_by_prompt[prompt_index]
