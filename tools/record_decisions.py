"""Records what the scheduler decides today, for tests/stats/test_recorded_decisions.py to compare with.

    python -m tools.record_decisions tests/stats/recorded

Random walks over configurations, layouts, failures and aborts, and a short simulation under each kind of scheduler.
Run it again only when decisions are meant to change; the commit then says which, and why.
"""

from __future__ import annotations

import argparse
import gzip
import random
from collections.abc import Iterator
from pathlib import Path

from experiments.lib.recording_runtime import RecordingSimRuntime, random_result
from megatron_medha.core.cost.step_cost import Hardware
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.loop import serve
from megatron_medha.core.model_shape import ModelShape
from megatron_medha.core.request import Request
from megatron_medha.core.scheduling.chunking import Chunking
from megatron_medha.core.scheduling.policies import POLICIES
from megatron_medha.engine.scheduler_setup import SchedulerSetup
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.simulate_options import SimulateOptions, simulation_config
from megatron_medha.sim.baselines.baseline_config import BASELINE_POLICIES, BaselineConfig
from megatron_medha.sim.simulation import Simulation, SimulationHooks
from megatron_medha.sim.system import build_scheduler
from megatron_medha.stats.decision_log import DecisionLog
from megatron_medha.system.best_effort_file import TextSink

_POLICIES = sorted((*POLICIES, *BASELINE_POLICIES))
WALKS = [seed for seed in range(26) if seed not in (13, 22)]  # in those nothing fits and no batch is formed
TINY = ModelShape(
    name="tiny", num_layers=6, hidden_size=64, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_context_len=400,
)  # fmt: skip
SLOW = Hardware(name="slow", flops_per_s=3e8, memory_bytes_per_s=1e9, step_overhead_s=2e-4, layer_overhead_s=2e-5,
                num_devices=64)  # fmt: skip
_LAYOUT_8 = ("hardware=a100_x16", "parallel.tp=8", "parallel.spp=1")
SIMULATIONS = {
    "lars": (*_LAYOUT_8, "parallel.spp=2", "workload.qps=1.5"),
    "lars_overloaded": (*_LAYOUT_8, "parallel.spp=2", "workload.qps=4", "workload.duration_s=15"),
    "lars_kvp": ("hardware=a100_x16", "parallel.tp=4", "parallel.spp=1", "parallel.kvp=4",
                 "parallel.max_tokens_per_shard=65536", "workload.qps=1"),
    "lars_3d": ("hardware=a100_x16", "parallel.tp=4", "parallel.spp=2", "parallel.kvp=2",
                "parallel.max_tokens_per_shard=131072", "workload.qps=1"),
    "lars_online": (*_LAYOUT_8, "belief=online", "truth=noisy", "workload.qps=1.5"),
    "lars_little_memory": (*_LAYOUT_8, "model.kv_memory_gib=2", "workload.long_share=0", "workload.qps=4"),
    "fcfs": (*_LAYOUT_8, "scheduler=fcfs", "workload.qps=1.5"),
    "edf": (*_LAYOUT_8, "scheduler=edf", "workload.qps=1.5"),
    "medha_lars": (*_LAYOUT_8, "scheduler=medha_lars", "workload.qps=1.5"),
    "vllm_chunk_512": (*_LAYOUT_8, "scheduler=vllm_chunk_512", "workload.qps=1.5"),
}  # fmt: skip


def walk(seed: int, stream: TextSink) -> None:
    """Requests of all lengths under a random configuration; some fail, stop, are aborted, or lose their ranks."""
    draw = random.Random(seed)
    kvp, spp, num_blocks = draw.choice((1, 1, 2, 3)), draw.randint(1, 3), draw.randint(4, 24)
    config = BaselineConfig(
        policy=_POLICIES[seed % len(_POLICIES)], is_preemptive=draw.random() < 0.7,
        chunking=draw.choice(list(Chunking)), step_budget_s=draw.choice((1e-4, 2e-3, 0.05, 1.0)),
        tile_tokens=draw.choice((1, 4)), max_batch_tokens=draw.choice((12, 400)), fixed_chunk_tokens=16,
        max_num_sequences=draw.randint(1, 12), min_deadline_s=draw.choice((1e-3, 0.5)),
        progress_share=draw.choice((0, 0.1)), max_skips=draw.choice((0, 10)), watermark=draw.choice((0.0, 0.1)),
        max_partial_prefills=draw.choice((None, 3)), reserved_share=draw.choice((0.0, 0.3)), short_prompt_tokens=40,
    )  # fmt: skip
    setup = SchedulerSetup(
        config=config.reduced, shape=TINY, hardware=SLOW, layout=ParallelLayout(spp=spp, kvp=kvp),
        num_blocks=num_blocks, block_size=4, max_tokens_per_shard=None if kvp == 1 else 4 * draw.randint(1, num_blocks),
        learns=draw.random() < 0.5,
    )  # fmt: skip
    requests = [
        Request(
            request_id=f"r{index}", num_prompt_tokens=draw.randint(0, 120), max_output_tokens=draw.randint(1, 12),
            arrival_s=draw.random() * 0.3, ttft_slo_s=draw.choice((None, 0.005, 10)),
            tpot_slo_s=draw.choice((None, None, 0.001)), priority=draw.choice((0, 0, 1, -5, 7)),
        )
        for index in range(draw.randint(8, 40))
    ]  # fmt: skip

    world = RecordingSimRuntime(
        requests, lambda batch: batch.predicted_s * draw.uniform(0.5, 1.5), spp, random_result(draw)
    )
    world.abort(draw.random() * 0.3, f"r{draw.randint(0, 17)}")
    if draw.random() < 0.4:
        world.lose_ranks(draw.random() * 0.3)
    serve(build_scheduler(setup), world, (DecisionLog(stream, setup.header()),))


def simulate(words: tuple[str, ...], stream: TextSink) -> None:
    """A short simulation, as `medha simulate` makes it of these words."""
    quick = ("workload.duration_s=25", "workload.output_scale=0.1", "workload.long_prompt_scale=0.2")
    options = freeze(compose("simulate", SimulateOptions, [*quick, *words]), SimulateOptions)
    config = simulation_config(options)
    log = DecisionLog(stream, config.setup.header())
    Simulation(config).run(SimulationHooks(observers=(log,)))


def logs() -> Iterator[tuple[str, int | tuple[str, ...]]]:
    """Names of what is recorded, and the walk's seed or the simulation's words."""
    for seed in WALKS:
        yield f"walk_{seed:02}", seed
    yield from SIMULATIONS.items()


def main(directory: Path) -> None:
    """Write all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, what in logs():
        path = directory / f"{name}.jsonl.gz"
        # Without a time of writing: the same decisions make the same file.
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
            stream = _Text(packed)
            if isinstance(what, int):
                walk(what, stream)
            else:
                simulate(what, stream)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


class _Text:
    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the logs go")
    main(parser.parse_args().directory)
