"""Which decodes surely follow a step, so that the rank may compute them while the API server still thinks about it.

Their tokens come from the host where it knows them, else from the device: the next step is then launched before
anyone has looked at the tokens of the last one, and the device waits for nobody between the two. Whether a token ended
its request is found out afterwards; a decode after such a token has cost its time and is dropped.

It has no other effect. Its keys and values go to blocks that were the request's own when it was launched. The API
server may have released them since and may give them to another request in a later step. All that such a step writes or
reads is launched later on the same stream, so it finds its own values there, in places it has written itself.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_medha.core.batch import Chunk
from megatron_medha.model.sampler import PendingSamples, SampledRow
from megatron_medha.worker.step_clock import StepTimer
from megatron_medha.worker.token_store import StoredRequest

StepWork = Sequence[tuple[Chunk, StoredRequest]]
TokenOrFault = SampledRow | str  # a token, or why there is none

_NOT_A_NUMBER = "the model's output is not a number for this request"


@dataclass(frozen=True, slots=True)
class PartnersTokens:
    """Tokens that another rank chooses and reports; here they are on the device alone."""

    token_ids_R: Tensor  # int64

    def rows(self) -> list[SampledRow | None]:
        """Nobody asks for them here."""
        raise AssertionError("the rank that chooses a token reports it")


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens the device has been asked for, a row a request."""

    requests: Sequence[StoredRequest]
    choices: PendingSamples | PartnersTokens
    faults: Mapping[str, str]  # why a request has no token, by its id
    wanted: Sequence[int]      # rows that the step at hand asks for

    def chosen(self) -> list[tuple[StoredRequest, TokenOrFault]]:
        """The wanted rows; waits for the device."""
        sampled = self.choices.rows()
        wanted = [(self.requests[row], sampled[row]) for row in self.wanted]
        return [(request, self.faults.get(request.request_id, one or _NOT_A_NUMBER)) for request, one in wanted]


class RunAheadDecodes:
    """Decodes launched before the API server asked for them; nobody has been told of their tokens."""

    def __init__(self, decodes: StepWork, underway: PendingTokens, span: StepTimer) -> None:
        """span: of these decodes alone."""
        rows = {request.request_id: row for row, request in enumerate(underway.requests)}
        self._decodes = {chunk.request_id: (rows[chunk.request_id], chunk.start, request) for chunk, request in decodes}
        self._underway = underway
        self.span = span

    def forget(self, request_ids: Container[str]) -> None:
        """These have lost their tables: what was written for them lies where nobody will read it."""
        self._decodes = {name: decode for name, decode in self._decodes.items() if name not in request_ids}

    def split(self, work: StepWork) -> tuple[StepWork, PendingTokens | None]:
        """Of a step's chunks, those still to be computed, and the others' tokens, if there are any."""
        rest, wanted = [], []
        for chunk, request in work:
            row, position, known = self._decodes.get(chunk.request_id, (0, 0, None))
            # A request that came again under its id is another one.
            if known is request and position == chunk.start and chunk.num_tokens == 1 and chunk.samples_token:
                wanted.append(row)
            else:
                rest.append((chunk, request))
        return rest, replace(self._underway, wanted=wanted) if wanted else None


def next_decodes(work: StepWork, *, num_pending: int = 0) -> StepWork:
    """What the API server will ask for after a step; empty where that is not known.

    num_pending: 0 once the step's tokens have been appended, 1 while they are on the device alone.

    Unknown is what follows a chunk within a prompt, where a decode's next block lies, and, as long as its last token is
    unseen, what a request with a grammar or penalties may say next. Requests that have ended by a stop token or their
    length are left out; that one was ended in another way, or that others come in between, costs the time of computing
    it and changes no result.
    """
    decodes: list[tuple[Chunk, StoredRequest]] = []
    for chunk, request in work:
        if not chunk.samples_token or request.fault is not None or num_pending and request.depends_on_tokens:
            return ()
        if not num_pending and request.output_ids[-1] in request.stop_token_ids:
            continue
        if len(request.output_ids) + num_pending >= request.sampling.max_output_tokens:
            continue
        start, num_tokens = chunk.start + chunk.num_tokens, request.num_tokens + num_pending
        assert start + 1 == num_tokens, f"{request.request_id}: position {start} of {num_tokens} tokens"
        if request.slot_table is None or request.slot_table.num_slots <= start:
            return ()
        decodes.append((Chunk(chunk.request_id, start, 1, True, chunk.kvp_ranks), request))
    return decodes


def pending_rows(decodes: StepWork, underway: Sequence[PendingTokens]) -> list[int]:
    """Where each decode's token lies among those under way, laid end to end."""
    places: dict[str, int] = {}
    first = 0
    for one in underway:
        places |= {one.requests[row].request_id: first + row for row in one.wanted}
        first += len(one.requests)
    return [places[chunk.request_id] for chunk, _ in decodes]
