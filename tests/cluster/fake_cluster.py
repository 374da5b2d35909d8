"""An engine over ranks without a model, and a load whose answers are known beforehand."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from clients import Client
from fake_rank import continuation

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.launch import LocalRanks, RankProcess, Ranks
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_engine import OpenRanks, cluster_engine, local_ranks
from megatron_medha.cluster.run_timeline import RunTimeline
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.engine import Engine, ObserverFactory

FAKE_RANK = (sys.executable, str(Path(__file__).with_name("fake_rank.py")))
POISON = 999
# Silence is no failure here: on a busy machine a rank may be put aside for seconds.
PATIENT = RecoveryConfig(max_failures=100, heartbeat_timeout_s=60.0)


class FakeCluster:
    """An engine over fake ranks, with a hand on their processes."""

    def __init__(
        self,
        directory: Path,
        layout: ParallelLayout,
        *,
        num_blocks: int = 400,
        shard_tokens: int | None = None,
        recovery: RecoveryConfig = PATIENT,
        open_ranks: OpenRanks | None = None,
        timeline: Path | None = None,
        watchers: tuple[ObserverFactory, ...] = (),
    ) -> None:
        """open_ranks: by default on this machine, as processes that kill() can reach."""
        self.directory = directory
        self.layout = layout
        self.ranks: LocalRanks
        self.engine: Engine = cluster_engine(
            rank_config=RankConfig(
                model=ModelOptions(block_size=16),
                layout=layout,
                server_endpoint="",
                checkpoint=str(directory),
                kv_memory_bytes=num_blocks,
                max_tokens_per_shard=shard_tokens,
                is_audited=True,  # every load here is also a test of the accounting
            ),
            # Steps of a few dozen tokens, so that prompts come in several chunks and batches overlap.
            scheduler_config=SchedulerConfig(step_budget_s=0.002, max_batch_tokens=96, max_num_sequences=64),
            hardware=Hardware(name="test", flops_per_s=1e10, memory_bytes_per_s=1e9),
            recovery=recovery,
            open_ranks=open_ranks or self._open_ranks,
            watchers=watchers,
            open_timeline=timeline and partial(RunTimeline.writing, timeline, layout, duration_s=3600.0),
        )
        self.client: Client

    def connect(self) -> FakeCluster:
        """Start the engine, with a client of its own."""
        self.client = Client(self.engine)
        return self

    def _open_ranks(self, configs: Sequence[RankConfig]) -> Any:
        @contextmanager
        def remember() -> Iterator[Ranks]:
            with local_ranks(command=FAKE_RANK)(configs) as ranks:
                assert isinstance(ranks, LocalRanks)
                self.ranks = ranks
                yield ranks

        return remember()

    @property
    def processes(self) -> list[RankProcess]:
        """Of the ranks started last."""
        return list(self.ranks._processes)

    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel's memory killer sends it."""
        next(process for process in self.processes if process.rank == rank).kill()

    @contextmanager
    def holding_starts(self) -> Iterator[None]:
        """Ranks that start in this block do not come up before its end."""
        hold = self.directory / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def poison(self, rank: int, kind: str) -> None:
        """The rank fails in this way, once."""
        written = self.directory / "fault.json.written"
        written.write_text(json.dumps({"rank": rank, "kind": kind, "token": POISON}))
        written.rename(self.directory / "fault.json")  # ranks look at every step: never at half of it


def mixed_load(seed: int, num_requests: int) -> dict[str, tuple[list[int], int]]:
    """Prompts of 1 to 700 tokens, 1 to 40 output tokens."""
    rng = random.Random(seed)
    return {
        f"r{index}": (
            [rng.randrange(900) for _ in range(rng.choice((1, 16, 17, 90, 300, 700)))],
            rng.randrange(1, 40),
        )
        for index in range(num_requests)
    }


def assert_all_are_answered(client: Client, load: dict[str, tuple[list[int], int]]) -> None:
    for name, (prompt, num_outputs) in load.items():
        assert client.tokens(name) == continuation(prompt, num_outputs), name


StartCluster = Callable[..., FakeCluster]
