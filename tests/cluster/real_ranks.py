"""An engine over real rank processes and a small random model, for tests."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from megatron_medha.cluster.health import RecoveryConfig
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.cluster.rank_engine import cluster_engine
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.scheduling.scheduler_config import SchedulerConfig
from megatron_medha.engine.engine import Engine, ObserverFactory

VOCAB_SIZE = 512
BLOCK_SIZE = 16
# Silence is no failure here: on a busy machine a rank may be put aside for seconds.
PATIENT = RecoveryConfig(heartbeat_timeout_s=60.0)
HARDWARE = Hardware(name="test", flops_per_s=5e10, memory_bytes_per_s=1e10)


def make_engine(
    checkpoint: Path,
    *,
    kv_blocks: int = 2048,
    log: Path | None = None,
    recovery: RecoveryConfig | None = None,
    layout: ParallelLayout = ParallelLayout(),  # noqa: B008
    shard_tokens: int | None = None,
    has_cache: bool = True,
    is_audited: bool = False,
    watchers: tuple[ObserverFactory, ...] = (),
    **scheduler: Any,
) -> Engine:
    block_bytes = 2 * 2 * 2 * 16 * BLOCK_SIZE * 4  # K and V, layers, heads, head dim, tokens, fp32
    return cluster_engine(
        rank_config=RankConfig(
            layout=layout,
            max_tokens_per_shard=shard_tokens,
            server_endpoint="",
            checkpoint=str(checkpoint),
            model=ModelOptions(device="cpu", block_size=BLOCK_SIZE, num_threads=1),
            kv_memory_bytes=kv_blocks * block_bytes,
            kv=KVConfig(prefix_cache=has_cache),
            is_audited=is_audited,
        ),
        scheduler_config=SchedulerConfig(**scheduler),
        hardware=HARDWARE,
        recovery=recovery or PATIENT,
        decision_log=log,
        watchers=watchers,
    )


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


def rank_pids() -> set[int]:
    """Our own child processes that are ranks."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            is_child = f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text()
            command = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue  # it ended meanwhile
        if is_child and "megatron_medha.worker.main" in command:
            found.add(int(entry.name))
    return found
