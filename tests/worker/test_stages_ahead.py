"""Two stages that go on to a batch's next decodes with tokens the API server has not told them, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

from megatron_medha.cluster.messages import RankStep, StepDone
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.kv.block_pool import Extent
from megatron_medha.core.kv.ops import append_op, drop_op
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.worker.startup.load import load_rank
from tests.worker.conftest import Front


def prompt(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(4, 512, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Recorded:
    """A lone rank, and the steps it has run with what it answered."""

    def __init__(self, rank: Any) -> None:
        self.rank = rank
        self.steps: list[RankStep] = []
        self.answers: list[StepDone] = []

    def run(self, step: RankStep) -> StepDone:
        self.steps.append(step)
        self.answers.append(self.rank.run(step))
        return self.answers[-1]


def played(config: RankConfig) -> Recorded:
    """A request alone, one that joins it, one that leaves, and one that is preempted and begins again."""
    rank, ready = load_rank(config, lambda what, fraction: None)
    alone = Recorded(rank)
    front = Front(alone, ready)
    drawn = {"temperature": 1.0, "top_p": 0.9}
    short, long = front.new("short", prompt(9, 1), seed=5, **drawn), front.new("long", prompt(37, 2), seed=6, **drawn)
    front.step([front.first("short", 9, room=16, samples=True)], [short])
    front.step([Chunk("short", 9, 1, True)])
    front.step([front.first("long", 20, room=48), Chunk("short", 10, 1, True)], [long])
    front.step([Chunk("long", 20, 17, True), Chunk("short", 11, 1, True)])
    front.step([Chunk("long", 37, 1, True), Chunk("short", 12, 1, True)])
    front.step([Chunk("short", 13, 1, True)], released=["long"])
    front.kv_ops += [drop_op("short"), append_op("short", 0, (Extent(ready.num_blocks - 2, 2),))]
    front.step([Chunk("short", 0, 15, True)])
    front.step([Chunk("short", 15, 1, True)])
    return alone


def test_stages_compute_the_next_decodes_before_they_are_told_the_tokens(
    rank_config: RankConfig, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(rank_config, kv_memory_bytes=1 << 20)
    alone = played(config)
    runs_ahead = [True, True, False, True, True, True, True, False]
    steps = []
    for index, step in enumerate(alone.steps):
        before = alone.answers[index - 1].tokens if index else ()
        told = tuple((t.request_id, t.token_id) for t in before if t.request_id not in step.released)
        steps.append(msgspec.structs.replace(step, sampled=told, runs_ahead=runs_ahead[index]))
    for index in range(2):
        one = msgspec.structs.replace(
            config, rank=index, layout=ParallelLayout(spp=2), init_method=f"file://{tmp_path}/meet"
        )
        (tmp_path / f"config-{index}").write_bytes(msgspec.json.encode(one))
    (tmp_path / "steps").write_bytes(msgspec.msgpack.encode(steps))
    command = [sys.executable, "-m", "tests.worker.test_stages_ahead", str(tmp_path)]
    stages = [subprocess.Popen([*command, str(index)], cwd=Path(__file__).parents[2]) for index in range(2)]
    assert [stage.wait(timeout=120) for stage in stages] == [0, 0]
    first, last = (json.loads((tmp_path / str(index)).read_text()) for index in range(2))
    assert last["tokens"] == [[token.token_id for token in done.tokens] for done in alone.answers]
    assert first["tokens"] == [[]] * len(steps)
    # Rows that were left when the step was asked for: what had been computed ahead is not computed again; a request
    # that has lost its KV begins from the start.
    assert first["rows"] == last["rows"] == [9, 0, 20, 18, 0, 0, 15, 0]


def run_stage(directory: Path, index: str) -> None:
    """One of two stages over the steps in the directory; its tokens and the rows of each step, to a file."""
    config = msgspec.json.decode((directory / f"config-{index}").read_bytes(), type=RankConfig)
    steps = msgspec.msgpack.decode((directory / "steps").read_bytes(), type=list[RankStep])
    rank, _ = load_rank(config, lambda what, fraction: None)
    rows: list[int] = []
    forward = rank._forward

    def counted(chunks: Any, *rest: Any) -> Any:
        rows[-1] += sum(chunk.num_tokens for chunk, _ in chunks)
        return forward(chunks, *rest)

    rank._forward = counted  # type: ignore[method-assign]
    tokens = []
    for step in steps:
        rows.append(0)
        tokens.append([token.token_id for token in rank.run(step).tokens])
    rank.finish()
    (directory / index).write_text(json.dumps({"tokens": tokens, "rows": rows}))


if __name__ == "__main__":
    run_stage(Path(sys.argv[1]), sys.argv[2])
