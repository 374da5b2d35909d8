"""Random steps for ranks: long ones that may be held, and short ones that are there to overtake them.

They are drawn whole before they run, so the same ones run with overtaking and without. There is no scheduler: these
are all the orders that its rules allow, also those that it would not find worth their cost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from megatron_medha.core.batch import Chunk
from megatron_medha.core.layout import ParallelLayout

SHARD_TOKENS, BLOCK_SIZE = 96, 8
BLOCKS_EACH = 2 * SHARD_TOKENS // BLOCK_SIZE  # of a request, on each kvp rank
NUM_PLACES = 12                               # for the blocks of so many requests
VOCAB_SIZE = 509
_MOST_LIVE = 9


@dataclass
class DrawnRequest:
    """A request, and how far the steps drawn so far bring it."""

    request_id: str
    token_ids: list[int]
    place: int       # its blocks are BLOCKS_EACH from there
    num_outputs: int
    has_prompt_logprobs: bool
    kvp_ranks: tuple[int, ...]  # of its shards, in their order
    num_done: int = 0
    is_busy: bool = False  # has a chunk in a step that may be in flight

    @property
    def num_left(self) -> int:
        """Tokens of the prompt and outputs that are fed back."""
        return len(self.token_ids) + self.num_outputs - 1 - self.num_done


@dataclass(frozen=True)
class DrawnStep:
    """One step, and when a rank that leads it waits for another one to overtake it."""

    batch_id: int
    chunks: tuple[Chunk, ...]
    released: tuple[str, ...]
    overtakes: int | None = None
    num_blocks: int = 0  # of a layer; 0: it is not held
    # (stage, point, batch id): that stage does not pass that point of it before the other one has come
    waits: tuple[tuple[int, int, int], ...] = ()
    waits_for: tuple[int, ...] = ()  # batches that are complete before this one is sent
    begins_round: bool = False       # all earlier ones are

    @property
    def leader(self) -> int:
        """The kvp index whose ranks decide at its points."""
        return min((kvp for chunk in self.chunks for kvp in chunk.kvp_ranks), default=0)


@dataclass
class RandomSteps:
    """What one walk does."""

    layout: ParallelLayout
    requests: dict[str, DrawnRequest]
    steps: list[DrawnStep]
    num_aborted: int = 0

    @property
    def waits(self) -> dict[tuple[int, int, int], int]:
        """By batch, stage and point: the batch that is to overtake there."""
        return {(step.batch_id, stage, point): other for step in self.steps for stage, point, other in step.waits}


@dataclass
class _Drawing:
    layout: ParallelLayout
    num_layers: int
    rng: random.Random
    requests: dict[str, DrawnRequest] = field(default_factory=dict)
    live: list[DrawnRequest] = field(default_factory=list)
    free_places: list[int] = field(default_factory=lambda: list(range(NUM_PLACES)))
    steps: list[DrawnStep] = field(default_factory=list)
    gone: list[DrawnRequest] = field(default_factory=list)  # not released yet
    num_aborted: int = 0

    def begin_requests(self) -> None:
        while len(self.live) < _MOST_LIVE and self.free_places:
            size = self.rng.choice((self.rng.randint(1, 24), self.rng.randint(1, 150), 170))
            request = DrawnRequest(
                request_id=f"r{len(self.requests)}", token_ids=[self.rng.randrange(4, VOCAB_SIZE) for _ in range(size)],
                place=self.free_places.pop(self.rng.randrange(len(self.free_places))),
                num_outputs=self.rng.randint(1, 8), has_prompt_logprobs=self.rng.random() < 0.3,
                kvp_ranks=tuple(self.rng.sample(range(self.layout.kvp), self.layout.kvp)),
            )  # fmt: skip
            self.requests[request.request_id] = request
            self.live.append(request)

    def chunk(self, request: DrawnRequest, most: int) -> Chunk:
        """The next one: of the prompt, not across two shards, or one output token."""
        start, num_prompt = request.num_done, len(request.token_ids)
        shard = start // SHARD_TOKENS if self.layout.kvp > 1 else 0
        end = min(start + most, num_prompt) if start < num_prompt else start + 1
        if self.layout.kvp > 1:
            end = min(end, (shard + 1) * SHARD_TOKENS)
        request.num_done, request.is_busy = end, True
        return Chunk(request.request_id, start, end - start, end >= num_prompt, request.kvp_ranks[: shard + 1])

    def step(
        self, requests: list[DrawnRequest], most: int, *, overtakes: int | None = None, num_blocks: int = 0,
        waits_for: tuple[int, ...] = (), begins_round: bool = False,
    ) -> int:  # fmt: skip
        """Draw one of these requests' next chunks; its batch id."""
        batch_id = len(self.steps) + 1
        released = tuple(request.request_id for request in self.gone)
        self.free_places += [request.place for request in self.gone]
        self.gone.clear()
        chunks = tuple(self.chunk(request, most) for request in requests)
        self.steps.append(
            DrawnStep(
                batch_id, chunks, released, overtakes, num_blocks, waits_for=waits_for, begins_round=begins_round
            )
        )
        return batch_id

    def leave(self, request: DrawnRequest) -> None:
        self.live.remove(request)
        self.gone.append(request)

    def end_of_round(self) -> None:
        """All steps are complete. Requests that are done go, and some are aborted."""
        for request in list(self.live):
            request.is_busy = False
            is_aborted = request.num_left > 0 and request.num_done > 0 and self.rng.random() < 0.06
            self.num_aborted += is_aborted
            if is_aborted or request.num_left <= 0:
                self.leave(request)

    def idle(self, num_most: int, *, is_prefill: bool = False) -> list[DrawnRequest]:
        found = [
            request
            for request in self.live
            if not request.is_busy and request.num_left > 0
            and (not is_prefill or request.num_done < len(request.token_ids))
        ]  # fmt: skip
        return self.rng.sample(found, min(len(found), self.rng.randint(1, num_most)))

    def round(self) -> None:
        """A step that may be held, perhaps another behind it, and up to three that overtake, one at a time."""
        rng = self.rng
        self.begin_requests()
        longs = self.idle(2, is_prefill=True)
        if not longs:
            self.step(self.idle(4), 64, begins_round=True)
            self.end_of_round()
            return
        held = [self.step(longs, 200, num_blocks=rng.choice((0, 1, 1, 2, 3)), begins_round=True)]
        behind = self.idle(2)
        if behind and rng.random() < 0.35:
            is_prefill = all(request.num_done < len(request.token_ids) for request in behind)
            held.append(self.step(behind, 200, num_blocks=rng.choice((0, 1, 2)) if is_prefill else 0))
        over: list[int] = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            shorts = self.idle(3)
            if not shorts:
                break
            over.append(self.step(shorts, rng.choice((1, 8, 40)), overtakes=held[0], waits_for=tuple(over)))
            for request in shorts:  # complete before the next of them; released beside the one held
                if request.num_left <= 0 or rng.random() < 0.1:
                    self.num_aborted += request.num_left > 0
                    self.leave(request)
        self.draw_waits(held, over)
        self.end_of_round()

    def draw_waits(self, held: list[int], over: list[int]) -> None:
        """At which points ranks wait: on each stage, for each of those that overtake, in their order."""
        for batch_id in held:
            step = self.steps[batch_id - 1]
            last = step.num_blocks * self.num_layers // self.layout.spp
            waits = []
            for stage in range(self.layout.spp if last else 0):
                points = sorted(self.rng.randint(0, last) for _ in over)
                for point, other in dict(zip(points, over, strict=True)).items():  # of those at one point, the last
                    if self.rng.random() < 0.8:
                        waits.append((stage, point, other))
            self.steps[batch_id - 1] = replace(step, waits=tuple(waits))


def random_steps(layout: ParallelLayout, seed: int, num_steps: int, num_layers: int) -> RandomSteps:
    """At least so many. num_layers: of the model."""
    drawing = _Drawing(layout, num_layers, random.Random(f"{layout}/{seed}"))
    while len(drawing.steps) < num_steps:
        drawing.round()
    return RandomSteps(layout, drawing.requests, drawing.steps, drawing.num_aborted)
