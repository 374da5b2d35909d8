"""Random steps that overtake others at random points, on real ranks: every bit as without overtaking.

    python -m experiments.overtaking.ranks                  # 10,000 steps
    python -m experiments.overtaking.ranks --steps 500
    python -m experiments.overtaking.ranks --layouts tp=2 "spp=2 kvp=2" --dtype bfloat16

Each walk is one layout and one seed: some 60 random steps, played with overtaking and, the same ones, without. Steps
that may be held wait, on each stage, at points drawn beforehand, 2 s at most, until another one has come. Compared
bit by bit: logits, sampled tokens and log-probabilities of prompts. Requests are aborted between steps and beside a
held one; in every tenth walk a rank is killed first while it holds a step. A rank that says nothing for --patience
seconds is a deadlock. Walks that have run are not run again (--out).

Also printed: CPU time of a point at which nothing overtakes, and of a change to another step and back.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.random_llama import save_llama
from experiments.lib.results_file import ResultsFile, verdict
from experiments.overtaking.random_steps import (
    BLOCK_SIZE,
    BLOCKS_EACH,
    NUM_PLACES,
    SHARD_TOKENS,
    VOCAB_SIZE,
    DrawnStep,
    RandomSteps,
    random_steps,
)
from megatron_medha.bits.rank_processes import RankProcesses, rank_processes
from megatron_medha.cluster.messages import NewRequest, RankStep, StepDone
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import KVOp, append_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling
from megatron_medha.parallel.shm_channel import pause
from megatron_medha.worker.hold_points import LEAST_ROWS
from megatron_medha.worker.rank import Rank

NUM_LAYERS = 6  # so that 2 and 3 stages have layers alike
KV_BYTES = 8 << 20
STEPS_PER_WALK = 60
LOSES_EVERY = 10  # walks
LAYOUTS = {
    "one": ParallelLayout(), "tp=2": ParallelLayout(tp=2), "spp=2": ParallelLayout(spp=2),
    "spp=3": ParallelLayout(spp=3), "kvp=2": ParallelLayout(kvp=2), "tp=2 kvp=2": ParallelLayout(tp=2, kvp=2),
    "spp=2 kvp=2": ParallelLayout(spp=2, kvp=2),
}  # fmt: skip
_COSTS = ("points_cpu_s", "switches", "switches_cpu_s")
MOST_WAIT_S = 2.0
LOOKS_PER_POINT = 2
NO_STEP = 1 << 60  # a batch that never comes

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class WaitsAtPoints:
    """Has ranks that decide wait at points of steps, each until the step that is to overtake there has come."""

    waits: dict[tuple[int, int, int], int]  # by batch, stage and point

    def __call__(self, rank: Rank, notes: dict[str, float]) -> None:
        """On the rank."""
        points = rank._points
        assert points is not None and points.can_hold, "these ranks hold no step"
        rank._plain_decodes = None  # they pass by the model's forward, whose logits are compared
        led, computed, has_found, stage, newest = (
            points._led, points.computed, points.has_found, points._coord.spp, -1,
        )  # fmt: skip
        looks: dict[int, int] = {}
        points.look_interval_s = 0.0  # after each item of the library's work

        def note_newest(step: RankStep) -> None:
            nonlocal newest
            newest = newest if step.overtakes is None else step.batch_id
            computed(step)

        def come(queued: Callable[[], Iterable[RankStep]], awaited: int) -> Iterable[RankStep]:
            """The steps that are queued, once that one is or has been."""
            started_s = time.monotonic()
            while True:
                steps = list(queued())
                passing = [step for step in steps if step.overtakes is not None and points._has_come(step)]
                waited_s = time.monotonic() - started_s
                if passing or newest >= awaited or waited_s > MOST_WAIT_S:
                    return steps
                pause(waited_s)

        def looking(point: int, held: RankStep, queued: Callable[[], Iterable[RankStep]]) -> bool:
            """Looks of a stage of one rank count as points: it may have no other ones."""
            if not points.is_alone:
                return has_found(point, held, queued)
            looks[held.batch_id] = number = looks.get(held.batch_id, 0) + 1
            awaited = self.waits.get((held.batch_id, stage, number // LOOKS_PER_POINT), -1)
            return has_found(point, held, lambda: come(queued, awaited))

        def waiting(
            place: int, held: RankStep, queued: Callable[[], Iterable[RankStep]], is_first: bool
        ) -> Iterator[int]:
            batch_id, point = divmod(place, 1 << 24)
            awaited = self.waits.get((batch_id, stage, point), -1)
            before_s = time.thread_time()
            num_found = 0
            for found in led(place, held, lambda: come(queued, awaited), is_first):
                num_found += 1
                yield found
            notes["overtakings"] = notes.get("overtakings", 0) + num_found
            if not num_found:
                notes["points"] = notes.get("points", 0) + 1
                notes["points_cpu_s"] = notes.get("points_cpu_s", 0.0) + time.thread_time() - before_s

        points._led, points.computed = waiting, note_newest  # type: ignore[method-assign]
        points.has_found = looking  # type: ignore[method-assign]
        measure_switches(rank, notes)


@dataclass
class Played:
    """The API server's part of one walk, with overtaking or without."""

    ranks: RankProcesses
    drawn: RandomSteps
    overtakes: bool
    patience_s: float
    found: Found = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    num_answers: dict[int, int] = field(default_factory=dict)
    held_s: float = 0.0
    outputs: dict[str, list[int]] = field(default_factory=dict)
    num_sent: dict[tuple[str, int], int] = field(default_factory=dict)  # outputs, by request and kvp rank that knows it

    def run(self) -> Found:
        """What all ranks say of all steps."""
        for step in self.drawn.steps:
            self.wait(range(1, step.batch_id) if step.begins_round else step.waits_for)
            self.send(step)
        self.wait(range(1, len(self.drawn.steps) + 1))
        return self.found

    def send(self, step: DrawnStep) -> None:
        """Every rank gets the chunks of its kvp index."""
        for request_id in step.released:
            for kvp in range(self.drawn.layout.kvp):
                self.num_sent.pop((request_id, kvp), None)
        may_be_held = self.overtakes and step.num_blocks > 0
        for kvp in range(self.drawn.layout.kvp):
            chunks = tuple(chunk for chunk in step.chunks if kvp in chunk.kvp_ranks)
            new = [chunk for chunk in chunks if (chunk.request_id, kvp) not in self.num_sent]
            sampled = [pair for chunk in chunks if chunk not in new for pair in self.unsent(chunk.request_id, kvp)]
            self.ranks.send_to_kvp_rank(
                kvp,
                RankStep(
                    step.batch_id, chunks, tuple(self.new_request(chunk, kvp) for chunk in new), step.released,
                    tuple(sampled), tuple(self.append(chunk, kvp) for chunk in new),
                    step.overtakes if self.overtakes else None, may_be_held,
                    3600.0, step.num_blocks * LEAST_ROWS if may_be_held else 0, step.leader,
                ),
            )  # fmt: skip

    def append(self, chunk: Chunk, kvp: int) -> KVOp:
        """The blocks of a request that begins on that kvp rank."""
        first = BLOCKS_EACH * self.drawn.requests[chunk.request_id].place
        return append_op(chunk.request_id, kvp, (Extent(first, BLOCKS_EACH),))

    def new_request(self, chunk: Chunk, kvp: int) -> NewRequest:
        """With all tokens known by now."""
        request = self.drawn.requests[chunk.request_id]
        outputs = self.outputs.get(request.request_id, [])
        self.num_sent[request.request_id, kvp] = len(outputs)
        return NewRequest(
            request.request_id, array("i", request.token_ids + outputs).tobytes(), len(request.token_ids),
            Sampling(
                max_output_tokens=request.num_outputs, temperature=0.0,
                num_prompt_logprobs=0 if request.has_prompt_logprobs else None,
            ),
        )  # fmt: skip

    def unsent(self, request_id: str, kvp: int) -> list[tuple[str, int]]:
        """Tokens that this kvp rank does not know yet. A lone rank sampled them itself."""
        if self.drawn.layout.world_size == 1:
            return []
        num_sent, outputs = self.num_sent[request_id, kvp], self.outputs.get(request_id, [])
        self.num_sent[request_id, kvp] = len(outputs)
        return [(request_id, token_id) for token_id in outputs[num_sent:]]

    def wait(self, batch_ids: Iterable[int]) -> None:
        """For all answers to these. Raises AssertionError on a deadlock."""
        layout = self.drawn.layout
        missing = [batch_id for batch_id in batch_ids if self.num_answers.get(batch_id, 0) < layout.kvp * layout.spp]
        while any(self.num_answers.get(batch_id, 0) < layout.kvp * layout.spp for batch_id in missing):
            for answer in self.ranks.answers(self.patience_s):
                self.note(answer.done, answer.logits_RV)
                for name, value in answer.notes.items():
                    self.notes[name] = self.notes.get(name, 0) + value

    def note(self, done: StepDone, logits_RV: np.ndarray | None) -> None:
        """One rank's answer."""
        assert not done.failed, done.failed
        self.num_answers[done.batch_id] = self.num_answers.get(done.batch_id, 0) + 1
        self.held_s += done.held_s
        for token in done.tokens:
            self.outputs.setdefault(token.request_id, []).append(token.token_id)
        # By request: a held step may end its chunks in another order.
        where = f"batch {done.batch_id}, rank {done.rank}"
        for token, logits_V in zip(done.tokens, [] if logits_RV is None else logits_RV, strict=True):
            self.found[f"{where}, {token.request_id}, token"] = np.array([token.token_id])
            self.found[f"{where}, {token.request_id}, logits"] = logits_V
        for part in done.prompt_logprobs:
            for position, each in enumerate(part.logprobs, part.first_position):
                self.found[f"{where}, {part.request_id}, prompt {position}"] = np.array([each.token_id, each.logprob])


class Walks:
    """Walks over layouts of one model."""

    def __init__(self, ranks: RankProcesses, checkpoint: Path, dtype: str, patience_s: float) -> None:
        self.ranks, self.checkpoint, self.dtype, self.patience_s = ranks, checkpoint, dtype, patience_s

    def load(self, layout: ParallelLayout, waits: dict[tuple[int, int, int], int]) -> None:
        """Ranks of that layout."""
        ready, *_ = self.ranks.load(
            RankConfig(
                layout=layout, server_endpoint="", checkpoint=str(self.checkpoint),
                model=ModelOptions(device="cpu", dtype=self.dtype, block_size=BLOCK_SIZE, num_threads=1),
                kv_memory_bytes=KV_BYTES, max_tokens_per_shard=SHARD_TOKENS if layout.kvp > 1 else 2 * SHARD_TOKENS,
            ),
            WaitsAtPoints(waits),
        )  # fmt: skip
        assert ready.num_blocks >= BLOCKS_EACH * NUM_PLACES, ready.num_blocks

    def play(self, drawn: RandomSteps, *, overtakes: bool) -> Played:
        """The steps on new ranks."""
        self.load(drawn.layout, drawn.waits if overtakes else {})
        played = Played(self.ranks, drawn, overtakes, self.patience_s)
        played.run()
        return played

    def lose(self, drawn: RandomSteps, victim: int) -> None:
        """Kill a rank while all stages hold the first step for one that never comes, or wait for that step."""
        first = next(step for step in drawn.steps if step.num_blocks)
        waits = {(first.batch_id, stage, 1): NO_STEP for stage in range(drawn.layout.spp)}
        self.load(drawn.layout, waits)
        played = Played(self.ranks, drawn, True, self.patience_s)
        for step in drawn.steps[: first.batch_id]:
            played.wait(range(1, step.batch_id) if step.begins_round else step.waits_for)
            played.send(step)
        self.ranks.lose(victim)

    def walk(self, layout: ParallelLayout, seed: int, num_steps: int) -> dict[str, Any]:
        """One walk's figures. Raises AssertionError naming the first number that differs."""
        drawn = random_steps(layout, seed, num_steps, NUM_LAYERS)
        if loses := seed % LOSES_EVERY == LOSES_EVERY - 1:
            self.lose(drawn, seed // LOSES_EVERY % layout.world_size)
        mixed, plain = self.play(drawn, overtakes=True), self.play(drawn, overtakes=False)
        assert mixed.found.keys() == plain.found.keys()
        for name, values in plain.found.items():
            assert np.array_equal(values, mixed.found[name]), f"{layout}, seed {seed}: {name} differs"
        assert not plain.notes and not plain.held_s
        return {
            "steps": len(drawn.steps), "overtakings": mixed.notes.get("overtakings", 0), "aborted": drawn.num_aborted,
            "lost": int(loses), "values": sum(values.size for values in plain.found.values()),
            **{name: mixed.notes.get(name, 0) for name in ("points", *_COSTS)},
        }  # fmt: skip


def measure_switches(rank: Rank, notes: dict[str, float]) -> None:
    """Note the CPU time that a rank takes to change to another step and back, without that step itself."""
    compute, overtake = rank._compute, rank._overtake
    computed_s = 0.0

    def timed_compute(*args: Any) -> StepDone:
        nonlocal computed_s
        started_s = time.thread_time()
        done = compute(*args)
        computed_s = time.thread_time() - started_s
        return done

    def timed_overtake(batch_id: int) -> None:
        started_s = time.thread_time()
        overtake(batch_id)
        notes["switches"] = notes.get("switches", 0) + 1
        notes["switches_cpu_s"] = notes.get("switches_cpu_s", 0.0) + time.thread_time() - started_s - computed_s

    rank._compute, rank._overtake = timed_compute, timed_overtake  # type: ignore[method-assign]


def run(options: argparse.Namespace) -> bool:
    """All walks that have not run yet, and the figures of all; whether the bars are met."""
    results = ResultsFile(options.out, {"dtype": options.dtype, "steps_per_walk": STEPS_PER_WALK})
    num_layouts, seed = len(options.layouts), options.seed
    cells: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as directory, rank_processes(4) as ranks:
        checkpoint = Path(directory)
        save_llama(
            checkpoint, hidden_size=64, ffn_size=96, num_layers=NUM_LAYERS, num_heads=8, num_kv_heads=2, head_dim=8,
            vocab_size=VOCAB_SIZE, initializer_range=0.2,
        )  # fmt: skip
        walks = Walks(ranks, checkpoint, options.dtype, options.patience)
        while sum(cell["steps"] for cell in cells) + len(failed) * STEPS_PER_WALK < options.steps:
            name = options.layouts[(seed - options.seed) % num_layouts]
            cell_seed = options.seed + (seed - options.seed) // num_layouts
            seed += 1
            try:
                walk = partial(walks.walk, LAYOUTS[name], cell_seed, STEPS_PER_WALK)
                cells.append(results.cell(f"{name}, seed {cell_seed}", walk) | {"layout": name})
            except (AssertionError, RuntimeError) as error:  # not kept: it is run again
                failed.append(f"{name}, seed {cell_seed}: {error}")
                print(failed[-1], flush=True)
                ranks.lose(0)  # they may wait for ever
    return _print_figures(options.layouts, cells, failed)


def _print_figures(layouts: list[str], cells: list[dict[str, Any]], failed: list[str]) -> bool:
    counted = ("steps", "overtakings", "aborted", "lost", "points", "values")
    print(f"{'layout':12}" + "".join(f"{name:>13}" for name in counted) + f"{'CPU/point':>13}{'CPU/switch':>13}")
    for layout in [*layouts, "all"]:
        found = [cell for cell in cells if layout in ("all", cell["layout"])]
        total = {name: sum(cell[name] for cell in found) for name in (*counted, *_COSTS)}
        point_us = 1e6 * total["points_cpu_s"] / max(1, total["points"])
        switch_us = 1e6 * total["switches_cpu_s"] / max(1, total["switches"])
        row = "".join(f"{int(total[name]):13,}" for name in counted)
        print(f"{layout:12}{row}{point_us:10.1f} us{switch_us:10.1f} us")
    print("CPU: of the rank that decides; a layer has as many points as blocks of rows. A switch: with the answer,")
    print("without the overtaking step itself.")
    return verdict(
        "walks that differ in a bit or come to a halt", f"{len(failed)} of {len(cells) + len(failed)}", "none",
        not failed,
    )  # fmt: skip


def main() -> int:
    """Walk; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of all layouts together, at least")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the first walk of each layout")
    parser.add_argument("--patience", type=float, default=60.0, metavar="S")
    parser.add_argument("--out", type=Path, default=Path("outputs/overtaking_ranks.json"))
    options = parser.parse_args()
    return 0 if run(options) else 1


if __name__ == "__main__":
    sys.exit(main())
