"""Sessions: turns that continue one another, each sent some time after the last one ended. No files, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_medha.core.errors import ConfigError
from megatron_medha.workload.key_chain import TextSpan, after_tokens, cut, num_tokens_of, spans_of_ids


class TurnRow(NamedTuple):
    """One turn as it is written down; rows of a session are in order, and those of its subagents among them."""

    session: str
    prompt_tokens: int
    output_tokens: int
    parent: str | None = None    # first turn of a session: it begins when the parent's turn above has ended
    start_s: float = 0.0         # first turn without a parent: when it comes
    think_s: float = 0.0         # both: after the turn before has ended, with all subagents that began there
    tool_s: float = 0.0
    shared_tokens: int | None = None  # of the session's (first turn: the parent's) text so far; None: all of it
    system_tokens: int = 0       # first turn without a parent: of a text that all sessions begin with
    hash_ids: tuple[int, ...] = ()    # of the blocks of the prompt; they replace what is said of shared texts


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTurn:
    """One request of a session. The texts are names of texts: nobody knows their tokens."""

    request_id: str
    gap_s: float                  # from the end of what it waits for; of a session's first turn: from its beginning
    prompt: tuple[TextSpan, ...]
    output: tuple[TextSpan, ...]
    num_new_tokens: int           # at the end of the prompt: neither the turn before nor the parent had them

    @property
    def num_prompt_tokens(self) -> int:
        """Of the whole prompt."""
        return num_tokens_of(self.prompt)

    @property
    def num_output_tokens(self) -> int:
        """Of the answer, which the next turn's prompt contains."""
        return num_tokens_of(self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSession:
    """The turns of one session, and where it begins."""

    name: str
    parent: str | None
    parent_turn: int              # it begins when this turn of the parent's has ended
    start_s: float                # of one without a parent
    turns: tuple[SessionTurn, ...]


def build_sessions(rows: Sequence[TurnRow], tokens_per_hash_id: int) -> list[AgentSession]:
    """The sessions that rows describe, in order of their first rows.

    Raises ConfigError naming session, turn, value and way out for rows that contradict each other.
    """
    of_session: dict[str, list[TurnRow]] = {}
    begins: dict[str, tuple[str | None, int]] = {}
    for row in rows:
        if row.session not in of_session:
            if row.parent is not None and row.parent not in of_session:
                raise ConfigError(f"session {row.session}: parent={row.parent} has no turn above it; "
                    "a subagent's rows follow the turn that begins it")
            begins[row.session] = row.parent, len(of_session[row.parent]) - 1 if row.parent is not None else 0
            of_session[row.session] = []
        elif row.parent not in (None, begins[row.session][0]):
            raise ConfigError(f"session {row.session}: parent={row.parent}, but an earlier turn says "
                f"{begins[row.session][0]}; a session has one")
        of_session[row.session].append(row)
    sessions: dict[str, AgentSession] = {}
    for name, turns in of_session.items():
        parent, parent_turn = begins[name]
        before: list[TextSpan] = []
        if parent is not None:
            begun_in = sessions[parent].turns[parent_turn]
            before = [*begun_in.prompt, *begun_in.output]
        sessions[name] = AgentSession(
            name=name, parent=parent, parent_turn=parent_turn, start_s=turns[0].start_s,
            turns=tuple(_turns(turns, before, tokens_per_hash_id)),
        )  # fmt: skip
    return list(sessions.values())


def _turns(rows: Sequence[TurnRow], before: list[TextSpan], tokens_per_hash_id: int) -> Iterable[SessionTurn]:
    """before: the parent's text."""
    with_ids = _texts_of_ids(rows, tokens_per_hash_id)
    for index, row in enumerate(rows):
        name = f"{row.session}.{index}"
        output = [TextSpan(f"{name}>", 0, row.output_tokens)]
        if row.hash_ids:
            prompt, output = with_ids[index]
            num_new_tokens = row.prompt_tokens - num_common_tokens(before, prompt)
        else:
            kept = before if row.shared_tokens is None else cut(before, row.shared_tokens)
            num_new_tokens = row.prompt_tokens - num_tokens_of(kept)
            if num_new_tokens < 0 or (row.shared_tokens or 0) > num_tokens_of(before):
                raise ConfigError(
                    f"session {row.session}, turn {index}: prompt_tokens={row.prompt_tokens} and shared_tokens="
                    f"{row.shared_tokens}, but the text before it has {num_tokens_of(before)}; a prompt begins with "
                    "all of that unless shared_tokens says with how much"
                )
            system = cut([TextSpan("system", 0, row.system_tokens)], 0 if before else num_new_tokens)
            prompt = [*kept, *system, *cut([TextSpan(name, 0, num_new_tokens)], num_new_tokens - num_tokens_of(system))]
        yield SessionTurn(
            request_id=name, gap_s=row.think_s + row.tool_s, prompt=tuple(prompt), output=tuple(output),
            num_new_tokens=num_new_tokens,
        )  # fmt: skip
        before = [*prompt, *output]


def _texts_of_ids(rows: Sequence[TurnRow], tokens_per_id: int) -> list[tuple[list[TextSpan], list[TextSpan]]]:
    """Prompts and outputs of turns with hash ids.

    The id of a block that is not full differs from the id of the same block in the next turn, where it is. What the
    next turn shows is taken for both, and the answer is what stands there after the prompt.
    """
    found: list[tuple[list[TextSpan], list[TextSpan]]] = []
    next_ids: tuple[int, ...] = ()
    next_tokens = 0
    for index, row in reversed(list(enumerate(rows))):
        ids, num_full = row.hash_ids, row.prompt_tokens // tokens_per_id
        own = TextSpan(f"{row.session}.{index}>", 0, row.output_tokens)
        output = [own]
        if ids and next_ids[:num_full] == ids[:num_full] and next_tokens > row.prompt_tokens:
            ids = (*ids[:num_full], *next_ids[num_full : len(ids)])
            shown = after_tokens(spans_of_ids(next_ids, next_tokens, tokens_per_id), row.prompt_tokens)
            output = cut(shown, row.output_tokens)
            output += cut([own], row.output_tokens - num_tokens_of(output))
        found.append((spans_of_ids(ids, row.prompt_tokens, tokens_per_id), output))
        next_ids, next_tokens = ids, row.prompt_tokens
    return found[::-1]


def num_common_tokens(one: Iterable[TextSpan], other: Iterable[TextSpan]) -> int:
    """How far two texts are equal."""
    num_tokens, left, right = 0, _merged(one), _merged(other)
    for mine, theirs in zip(left, right, strict=False):
        if mine[:2] != theirs[:2]:
            break
        num_tokens += min(mine.num_tokens, theirs.num_tokens)
        if mine.num_tokens != theirs.num_tokens:
            break
    return num_tokens


def _merged(spans: Iterable[TextSpan]) -> list[TextSpan]:
    found: list[TextSpan] = []
    for span in spans:
        if found and found[-1].text == span.text and found[-1].first + found[-1].num_tokens == span.first:
            found[-1] = found[-1]._replace(num_tokens=found[-1].num_tokens + span.num_tokens)
        else:
            found.append(span)
    return found
