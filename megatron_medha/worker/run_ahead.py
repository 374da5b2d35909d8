"""Which decodes surely follow a step, so that the rank may compute them while the front still thinks about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron_medha.core.batch import Chunk
from megatron_medha.model.sampler import SampledRow
from megatron_medha.worker.token_store import StoredRequest

Work = Sequence[tuple[Chunk, StoredRequest]]
Chosen = SampledRow | str  # a token, or why there is none


class Found(NamedTuple):
    """One decode's result."""

    request: StoredRequest
    position: int
    sampled: Chosen


class Held:
    """Decodes computed before the front asked for them; nobody has been told of their tokens."""

    def __init__(self, found: Iterable[Found], duration_s: float) -> None:
        """duration_s: what computing them took."""
        self._found = {one.request.request_id: one for one in found}
        self.duration_s = duration_s

    def split(self, work: Work) -> tuple[Work, list[tuple[StoredRequest, Chosen]]]:
        """Of a step's chunks, those still to be computed, and the results of the others."""
        rest, found = [], []
        for chunk, request in work:
            one = self._found.get(chunk.request_id)
            # A request that came anew under its id is another one.
            is_it = one is not None and one.request is request and one.position == chunk.start
            if one is not None and is_it and chunk.num_tokens == 1 and chunk.samples_token:
                found.append((request, one.sampled))
            else:
                rest.append((chunk, request))
        return rest, found


def next_decodes(work: Work) -> Work:
    """What the front will ask for after a step whose tokens have been appended; empty where that is not known.

    Unknown is what follows a chunk within a prompt, and where a decode's next block lies. Requests that have ended by
    a stop token or their length are left out; that one was ended in another way, or that others come in between, costs
    the time of computing it and changes no result.
    """
    decodes: list[tuple[Chunk, StoredRequest]] = []
    for chunk, request in work:
        if not chunk.samples_token or request.fault is not None:
            return ()
        if request.output_ids[-1] in request.stop_token_ids:
            continue
        if len(request.output_ids) >= request.sampling.max_output_tokens:
            continue
        start = chunk.start + chunk.num_tokens
        assert start + 1 == request.num_tokens, f"{request.request_id}: position {start} of {request.num_tokens} tokens"
        if request.slot_table is None or request.slot_table.num_slots <= start:
            return ()
        decodes.append((Chunk(chunk.request_id, start, 1, True, chunk.kvp_ranks), request))
    return decodes
