"""/v1/completions: from its body to a GenerationSpec, and from pieces to its JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from megatron_medha.server.detokenizer import make_detokenizer
from megatron_medha.server.errors import bad_request
from megatron_medha.server.generation import GenerationSpec, Piece, Prompt
from megatron_medha.server.logprobs import (
    TokenNamer,
    add_completion_token,
    empty_completion_logprobs,
    extend_completion_logprobs,
    token_namer,
)
from megatron_medha.server.openai_types import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from megatron_medha.server.prompts import encode_prompts, split_prompts
from megatron_medha.server.request_fields import (
    Wishes,
    check_common,
    check_num_logprobs,
    generation_spec,
    num_choices_of,
    sampling_of,
)
from megatron_medha.server.service import Ready, Service
from megatron_medha.server.tokens import Tokenizer
from megatron_medha.server.wire_format import MARK, EventTemplate, encode_json, sse_event


async def plan_completion(
    service: Service, ready: Ready, body: CompletionRequest, wishes: Wishes, arrival_s: float
) -> GenerationSpec:
    """Check a request and encode its prompts; ApiError 4xx says what is wrong."""
    config = service.config
    model = service.model_name(body.model)
    check_common(body)
    if body.suffix:
        raise bad_request("suffix: filling in between is not supported", "suffix", "unsupported_parameter")
    n = num_choices_of(body, config)
    if body.best_of is not None and body.best_of != n:
        raise bad_request(f"best_of: only best_of == n is supported, n is {n}", "best_of", "unsupported_parameter")
    if body.logprobs is not None:
        check_num_logprobs(body.logprobs, config, "logprobs")
    max_tokens = body.max_tokens
    is_echo = bool(body.echo)
    sampling = sampling_of(
        body,
        ready,
        config,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=body.logprobs if is_echo else None,
        max_tokens=max_tokens,
    )
    raw_prompts = split_prompts(body.prompt, config.max_prompts)
    service.admission.check_places(config, len(raw_prompts) * n)
    prompts = await encode_prompts(
        service,
        ready,
        raw_prompts,
        max_tokens=max_tokens,
        default_max_tokens=max(config.default_max_output_tokens, sampling.min_output_tokens),
        add_special_tokens=body.add_special_tokens is not False,
        param="prompt",
    )
    return generation_spec(
        service,
        body,
        wishes,
        id_prefix="cmpl",
        model=model,
        arrival_s=arrival_s,
        prompts=prompts,
        n=n,
        sampling=sampling,
        is_echo=is_echo,
        discards_output=max_tokens == 0,
    )


class CompletionFormat:
    """JSON of /v1/completions."""

    def __init__(self, spec: GenerationSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._name: TokenNamer = token_namer(tokenizer, by_id=spec.names_tokens_by_id)
        self._has_logprobs = spec.sampling.num_logprobs is not None
        self._is_plain = not (self._has_logprobs or spec.has_continuous_usage or spec.returns_token_ids)
        self._template = EventTemplate(spec, self._encode_event(CompletionChoice(index=0, text=MARK), None))
        self._echo_by_prompt: dict[int, str] = {}

    def opening_events(self) -> Sequence[bytes]:
        """None: the first event brings the first token."""
        return ()

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        """The event of one token; the first one brings the echoed prompt too."""
        is_echo = self._spec.is_echo
        if self._is_plain and piece.finish_reason is None and not (is_echo and piece.is_first):
            return self._template.fill(piece.choice_index, piece.text)
        return self._encode_event(self._choice([piece]), usage)

    def usage_event(self, usage: Usage) -> bytes:
        """The event after the last token: usage, and no choices."""
        return sse_event(self._answer([], usage))

    def whole(self, pieces_by_choice: Sequence[Sequence[Piece]], usage: Usage) -> bytes:
        """The answer that is not a stream."""
        return encode_json(self._answer([self._choice(pieces) for pieces in pieces_by_choice], usage))

    def _encode_event(self, choice: CompletionChoice, usage: Usage | None) -> bytes:
        with_usage = usage if usage is not None or self._spec.includes_usage else msgspec.UNSET
        return sse_event(self._answer([choice], with_usage))

    def _answer(
        self, choices: list[CompletionChoice], usage: Usage | None | msgspec.UnsetType
    ) -> CompletionAnswer:
        spec = self._spec
        return CompletionAnswer(id=spec.answer_id, created=spec.created, model=spec.model, choices=choices, usage=usage)

    def _choice(self, pieces: Sequence[Piece]) -> CompletionChoice:
        spec = self._spec
        first, last = pieces[0], pieces[-1]
        prompt_index = first.choice_index // spec.n
        prompt = spec.prompts[prompt_index]
        text = "".join(piece.text for piece in pieces)
        is_begin = spec.is_echo and first.is_first
        echo = self._echo(prompt_index, prompt) if spec.is_echo else ""
        token_ids = [piece.token_id for piece in pieces if piece.token_id is not None]
        return CompletionChoice(
            index=first.choice_index,
            text=echo + text if is_begin else text,
            logprobs=self._logprobs(prompt, pieces, len(echo)) if self._has_logprobs else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            token_ids=token_ids if spec.returns_token_ids else msgspec.UNSET,
            prompt_token_ids=prompt.token_ids.tolist() if spec.returns_token_ids and first.is_first else msgspec.UNSET,
        )

    def _logprobs(self, prompt: Prompt, pieces: Sequence[Piece], num_echo_chars: int) -> CompletionLogprobs:
        lists = empty_completion_logprobs()
        if self._spec.is_echo and pieces[0].is_first:
            extend_completion_logprobs(lists, self._prompt_logprobs(prompt, pieces[0]))
        for piece in pieces:
            if piece.token_id is not None:
                offset = num_echo_chars + piece.text_offset
                add_completion_token(lists, piece.token_id, piece.logprobs, offset, self._name)
        return lists

    def _prompt_logprobs(self, prompt: Prompt, piece: Piece) -> CompletionLogprobs:
        lists = empty_completion_logprobs()
        detokenizer = make_detokenizer(
            self._tokenizer, (), skip_special_tokens=self._spec.skips_special_tokens
        )
        known = piece.prompt_logprobs or ()
        num_chars = 0
        for position, token_id in enumerate(prompt.token_ids):
            logprobs = known[position - 1] if 0 < position <= len(known) else None
            add_completion_token(lists, token_id, logprobs, num_chars, self._name)
            num_chars += len(detokenizer.push(token_id))
        return lists

    def _echo(self, prompt_index: int, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if prompt_index not in self._echo_by_prompt:
            self._echo_by_prompt[prompt_index] = self._tokenizer.decode(
                prompt.token_ids, skip_special_tokens=self._spec.skips_special_tokens
            )
        return self._echo_by_prompt[prompt_index]
