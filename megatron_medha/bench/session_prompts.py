"""The prompts of sessions as a server is sent them: what was sent before, the answers that came, and new text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import NamedTuple, Protocol

import aiohttp

from megatron_medha.bench.client import StreamResult, Target, TokenRange, completion_body, run_completion
from megatron_medha.bench.idle import BenchError
from megatron_medha.workload.key_chain import TextSpan, after_tokens, num_tokens_of
from megatron_medha.workload.sessions import AgentSession, SessionTurn, num_common_tokens

_PROBE_TOKENS = 64
_PROBE_CHARACTERS = 4000
# Of a request's body, for the token ids of its answer: vLLM's name, which is ours as well, and llama.cpp's.
_ID_FIELDS: tuple[Mapping[str, object], ...] = ({"return_token_ids": True}, {"return_tokens": True, "verbose": True})


class PromptForm(Enum):
    """What a session's prompts are sent as."""

    AUTO = "auto"  # token ids if the server returns those of its answers, else text
    IDS = "ids"
    TEXT = "text"


class PromptPiece(NamedTuple):
    """A part of a prompt: token ids, or text that is about so many tokens."""

    num_tokens: int
    content: list[int] | str

    def cut(self, num_tokens: int) -> PromptPiece:
        """Its beginning."""
        share = min(1.0, num_tokens / max(self.num_tokens, 1))
        return PromptPiece(min(num_tokens, self.num_tokens), self.content[: round(share * len(self.content))])


class PromptMaker(Protocol):
    """Makes pieces of prompts."""

    @property
    def fields(self) -> Mapping[str, object]:
        """What a request's body needs for its answer to be read."""

    def drawn(self, span: TextSpan) -> PromptPiece:
        """Part of a text: the same content for the same name."""

    def answered(self, streamed: StreamResult) -> PromptPiece:
        """An answer."""

    def joined(self, pieces: Sequence[PromptPiece]) -> list[int] | str:
        """A prompt."""


@dataclass(frozen=True, slots=True)
class IdPrompts:
    """Prompts as token ids: exactly as long as they are to be."""

    tokens: TokenRange
    seed: int
    fields: Mapping[str, object] = field(default_factory=lambda: _ID_FIELDS[0])  # for the ids of answers

    def drawn(self, span: TextSpan) -> PromptPiece:
        """See PromptMaker."""
        ids = self.tokens.prompt(span.first + span.num_tokens, self.seed, span.text)[span.first :]
        return PromptPiece(span.num_tokens, ids)

    def answered(self, streamed: StreamResult) -> PromptPiece:
        """See PromptMaker."""
        return PromptPiece(len(streamed.token_ids), streamed.token_ids)

    def joined(self, pieces: Sequence[PromptPiece]) -> list[int]:
        """See PromptMaker."""
        return [token for piece in pieces for token in piece.content if isinstance(token, int)]


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Prompts as text of made-up words, as long as they are to be on average."""

    seed: int
    characters_per_token: float

    @property
    def fields(self) -> Mapping[str, object]:
        """See PromptMaker."""
        return {}

    def drawn(self, span: TextSpan) -> PromptPiece:
        """See PromptMaker."""
        first, end = (round(self.characters_per_token * place) for place in (span.first, sum(span[1:])))
        return PromptPiece(span.num_tokens, words(end, f"{self.seed}/{span.text}")[first:])

    def answered(self, streamed: StreamResult) -> PromptPiece:
        """See PromptMaker."""
        return PromptPiece(streamed.num_tokens, streamed.text)

    def joined(self, pieces: Sequence[PromptPiece]) -> str:
        """See PromptMaker."""
        return "".join([piece.content for piece in pieces if isinstance(piece.content, str)])


def words(num_characters: int, name: str) -> str:
    """Made-up words; a longer text of the same name begins with them."""
    draw, found, length = Random(name), [], 0
    while length < num_characters:
        found.append(" " + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))))
        length += len(found[-1])
    return "".join(found)[:num_characters]


class SessionPrompts:
    """What every live session has sent and been answered, and its next prompt."""

    def __init__(self, maker: PromptMaker) -> None:
        self._maker = maker
        self._sent: dict[str, tuple[SessionTurn, list[PromptPiece]]] = {}  # latest turn by session, with its answer

    def prompt(self, session: AgentSession, turn: SessionTurn) -> list[int] | str:
        """Of a session's next turn: what it shares with the turn or the parent's turn before, and its own text."""
        spans = list(turn.prompt)
        pieces: list[PromptPiece] = []
        before = self._sent.get(session.name) or self._sent.get(session.parent or "")
        if before is not None:
            last, sent = before
            whole = [*last.prompt, *last.output]
            num_common = num_common_tokens(whole, spans)
            # An answer may have had fewer tokens than were asked for: all of the text is all of it.
            pieces = sent[:] if num_common == num_tokens_of(whole) else _cut(sent, num_common)
            spans = after_tokens(spans, num_common)
        pieces += [self._maker.drawn(span) for span in spans]
        self._sent[session.name] = turn, pieces
        return self._maker.joined(pieces)

    def answered(self, session: AgentSession, streamed: StreamResult) -> None:
        """The latest turn's answer has come."""
        self._sent[session.name][1].append(self._maker.answered(streamed))


def _cut(pieces: Sequence[PromptPiece], num_tokens: int) -> list[PromptPiece]:
    found: list[PromptPiece] = []
    for piece in pieces:
        if num_tokens <= 0:
            break
        found.append(piece.cut(num_tokens))
        num_tokens -= piece.num_tokens
    return found


async def prompt_maker(
    form: PromptForm, target: Target, session: aiohttp.ClientSession, model: str, tokens: TokenRange, seed: int
) -> PromptMaker:
    """What the server can be sent. Raises BenchError where that cannot be found out, or is not what was asked for."""
    if form is not PromptForm.TEXT:
        prompt = tokens.prompt(_PROBE_TOKENS, seed, "probe")
        for fields in _ID_FIELDS:
            streamed = await run_completion(target, session, completion_body(target, model, prompt, 2, fields), 2)
            if len(streamed.token_ids) == 2:
                return IdPrompts(tokens, seed, fields)
        if form is PromptForm.IDS:
            why = streamed.error or "it does not return the token ids of its answers (return_token_ids)"
            raise BenchError(f"prompts=ids: {target.url}: {why}; use prompts=text")
    text = words(_PROBE_CHARACTERS, f"{seed}/probe")
    streamed = await run_completion(target, session, completion_body(target, model, text, 1), 1)
    if streamed.error is not None or not streamed.num_prompt_tokens:
        why = streamed.error or "it does not say how many tokens a prompt has (usage.prompt_tokens)"
        raise BenchError(f"prompts=text: {target.url}: {why}")
    return TextPrompts(seed, _PROBE_CHARACTERS / streamed.num_prompt_tokens)
