"""What one HTTP request asks the engine to generate, and how each of its choices grows token by token."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_medha.core.batch import FinishReason
from megatron_medha.core.kv.prefix_keys import GranuleKeys
from megatron_medha.core.ports import TokenDelivery
from megatron_medha.core.request import Request
from megatron_medha.core.sampling import Sampling, TokenLogprobs
from megatron_medha.server.slo import SloClass
from megatron_medha.server.tools.tool_fields import ToolUse
from megatron_medha.text.chat.call_syntax import tokens_of
from megatron_medha.text.detokenizer import make_detokenizer
from megatron_medha.text.stop_strings import StopMatcher
from megatron_medha.text.tokenizer import Tokenizer

SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, encoded and checked."""

    token_ids: array[int]
    keys: GranuleKeys | None = None  # to be continued by each choice's output
    prefix_keys: bytes = b""         # of its full granules
    text: str | None        # as the client wrote it; None when it sent token ids
    max_output_tokens: int  # at least 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """One HTTP request, checked: nothing in it can be refused any more but by the engine."""

    response_id: str
    created: int
    model: str
    arrival_s: float
    prompts: tuple[Prompt, ...]
    n: int                       # choices of each prompt that are generated
    num_answered: int            # and of those, how many are answered: the best ones
    sampling: Sampling           # without seed and length, which differ by choice
    seed: int
    priority: int = 0
    slo: SloClass = SloClass()
    slo_class: str = ""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    stops: tuple[str, ...] = ()
    client_stop_ids: frozenset[int] = frozenset()  # to tell the client which of its own ended a choice
    includes_stop: bool = False
    skips_special_tokens: bool = True
    is_stream: bool = False
    has_progress: bool = False     # comments while the prompt is computed; of effect on streams
    includes_usage: bool = False
    has_continuous_usage: bool = False
    has_logprobs: bool = False     # whether the response includes them; best_of needs them too
    is_echo: bool = False
    discards_output: bool = False  # max_tokens 0: the client wants the prompt's logprobs
    names_tokens_by_id: bool = False
    returns_token_ids: bool = False
    prefix_root: bytes | None = None  # of its prompts' keys; None: the prefix cache takes and gives nothing
    session_id: str = ""           # qualified by the client's key
    ends_session: bool = False
    tools: ToolUse | None = None   # None: all output is text
    ignored: tuple[str, ...] = ()  # what the request asked for, and was left out: fields by their path

    @property
    def num_choices(self) -> int:
        """Over all prompts."""
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def request_id(self, index: int) -> str:
        """The engine's name for a choice; unique because response ids are made here, never taken from clients."""
        return f"{self.response_id}-{index}"

    def requests(self) -> tuple[Request, ...]:
        """What the scheduler gets of each choice."""
        return tuple(
            Request(
                request_id=self.request_id(index),
                num_prompt_tokens=len(prompt.token_ids),
                max_output_tokens=prompt.max_output_tokens,
                arrival_s=self.arrival_s,
                ttft_slo_s=self.ttft_slo_s,
                tpot_slo_s=self.tpot_slo_s,
                priority=self.priority,
                deadline_multiplier=self.slo.deadline_multiplier,
                min_deadline_s=self.slo.min_deadline_s,
                slo_class=self.slo_class,
                prefix_keys=prompt.prefix_keys,
                # Log-probabilities are of positions that are computed.
                session_id=self.session_id,
                ends_session=self.ends_session,
                reads_cache=self.sampling.num_prompt_logprobs is None,
            )
            for index, prompt in enumerate(prompt for prompt in self.prompts for _ in range(self.n))
        )

    def sampling_of(self, index: int) -> Sampling:
        """How a choice is sampled."""
        seed, prompt = (self.seed + index) & SEED_MASK, self.prompts[index // self.n]
        return replace(self.sampling, seed=seed, max_output_tokens=prompt.max_output_tokens)


class Piece(NamedTuple):
    """What one token adds to a choice. Its text may be empty, or that of several tokens."""

    choice_index: int
    text: str
    token_id: int | None  # None: the token was asked for only to have its prompt computed
    logprobs: TokenLogprobs | None
    text_offset: int      # characters of output decoded before this token
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    is_first: bool


class Choice:
    """One sub-request's output so far."""

    def __init__(self, spec: GenerationSpec, index: int, tokenizer: Tokenizer) -> None:
        self.index = index
        self.prompt = spec.prompts[index // spec.n]
        self.num_tokens = 0
        self.num_cached_tokens = 0  # of its prompt, once the first token is there
        self.finish_reason: str | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._spec = spec
        self._num_chars = 0
        self._detokenizer = make_detokenizer(
            tokenizer,
            self.prompt.token_ids[-16:],
            skip_special_tokens=spec.skips_special_tokens,
            shown=() if spec.tools is None else tokens_of(spec.tools.syntax),
        )
        self._matcher = StopMatcher(spec.stops, is_included=spec.includes_stop) if spec.stops else None
        self._has_begun = False

    def take(self, delivery: TokenDelivery) -> Piece:
        """Add a token; the piece has a finish reason when the choice is complete."""
        is_first = not self._has_begun
        self._has_begun = True
        if is_first:
            self.num_cached_tokens = delivery.num_cached_tokens
        if self._spec.discards_output:
            self.finish_reason = "length"
            return Piece(self.index, "", None, None, 0, "length", None, delivery.prompt_logprobs, is_first)
        self.num_tokens += 1
        reason = delivery.finish_reason
        offset = self._num_chars
        text = ""
        stop_reason: int | str | None = None
        # A stop token ends the text; it is not part of it.
        if reason is not FinishReason.STOP or self._spec.includes_stop:
            text = self._detokenizer.push(delivery.token_id)
        if reason is not None:
            text += self._detokenizer.finish()
            self.finish_reason = reason.value
        self._num_chars += len(text)
        if reason is FinishReason.STOP and delivery.token_id in self._spec.client_stop_ids:
            stop_reason = delivery.token_id
        if self._matcher is not None:
            is_armed = self.num_tokens >= self._spec.sampling.min_output_tokens
            text, found = self._matcher.push(text, is_armed=is_armed)
            if found is not None:
                stop_reason = found
                self.finish_reason = FinishReason.STOP.value
            elif reason is not None:
                text += self._matcher.finish()
        return Piece(
            self.index, text, delivery.token_id, delivery.logprobs, offset,
            self.finish_reason, stop_reason, delivery.prompt_logprobs, is_first,
        )
