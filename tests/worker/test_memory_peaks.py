"""KV gets what the largest step and CUDA graphs leave of a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch

from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.worker.startup import load
from megatron_medha.worker.startup.memory_peaks import StepPeaks, kv_bytes_beside, measured_peaks


class Device:
    """1,000 bytes, of which a step takes one per token while it runs, and the first one 50 for good."""

    def __init__(self) -> None:
        self.kept, self.peak = 100, 100
        self.steps: list[int] = []

    def step(self, num_tokens: int) -> None:
        self.kept += 0 if self.steps else 50
        self.steps.append(num_tokens)
        self.peak = max(self.peak, self.kept + num_tokens)

    def free(self) -> int:
        return 1000 - self.kept

    def allocated(self) -> int:
        return self.kept

    def peak_of(self, work: Callable[[], object]) -> int:
        self.peak = self.kept
        work()
        return self.peak


def test_what_the_first_step_keeps_and_the_largest_needs_is_not_given_to_kv() -> None:
    device = Device()
    peaks = measured_peaks(device, device.step, largest_tokens=400, graph_tokens=100)
    assert peaks == StepPeaks(largest=400, graphs=100)
    assert kv_bytes_beside(device, peaks, 0.5) == (1000 - 150 - 500) // 2


def test_without_graphs_their_step_is_not_run() -> None:
    device = Device()
    assert measured_peaks(device, device.step, largest_tokens=400, graph_tokens=0).graphs == 0
    assert device.steps == [1, 400]


def test_a_step_that_needs_more_than_there_is_leaves_nothing() -> None:
    assert kv_bytes_beside(Device(), StepPeaks(2000, 0), 0.9) == 0


def test_a_rank_measures_its_largest_step_and_serves_with_what_that_leaves(
    rank_config: RankConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    asked: list[int] = []

    def measured(memory: object, run_step: Callable[[int], object], **sizes: int) -> StepPeaks:
        for num_tokens in (1, sizes["largest_tokens"]):
            run_step(num_tokens)
            asked.append(num_tokens)
        assert sizes["graph_tokens"] == 0, "this backend has no graphs"
        return StepPeaks(1 << 20, 0)

    monkeypatch.setattr(load, "free_device_bytes", lambda device: 8 << 20)
    monkeypatch.setattr(load, "CudaMemory", lambda number: device)
    monkeypatch.setattr(load, "measured_peaks", measured)
    monkeypatch.setattr(load, "kv_bytes_beside", lambda memory, peaks, share: int(((8 << 20) - peaks.largest) * share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = msgspec.structs.replace(rank_config, kv_memory_bytes=None, max_batch_tokens=300)
    rank, ready = load.load_rank(config, lambda what, fraction: None)
    assert asked == [1, 300]
    given = msgspec.structs.replace(config, kv_memory_bytes=int((7 << 20) * 0.92))
    assert ready.num_blocks == load.load_rank(given, lambda what, fraction: None)[1].num_blocks
