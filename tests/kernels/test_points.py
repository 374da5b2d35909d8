"""Points inside attention: what is computed there changes no bit of what is left, and its errors come out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from paged_world import World

from megatron_medha.kernels.attention.aten_attention import AtenAttention
from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.attention.native_attention import NativeAttention


@dataclass
class DrawnPoints:
    """Points of which some are overtaken."""

    work: Callable[[], None]
    rng: random.Random
    interval_s: float = 0.0
    num_looks: int = 0
    num_overtaken: int = 0
    num_agreed: int = 0

    def is_overtaken(self) -> bool:
        self.num_looks += 1
        return self.rng.random() < 0.3

    def overtake(self) -> None:
        self.num_overtaken += 1
        self.work()

    def agree(self, count: int = 1) -> None:
        self.num_agreed += count


def attention_of(
    backend: AttentionBackend, num_tokens: int, num_before: int, dtype: torch.dtype, seed: int
) -> Callable[[], torch.Tensor]:
    """Attention of tokens after others, to be computed any number of times."""
    torch.manual_seed(seed)
    random.seed(seed)
    world = World(backend, num_kv_heads=2, group=3, head_dim=16, dtype=dtype)
    sequence = world.add(num_before + num_tokens)
    first = slice(0, num_before)
    q_TKGD = torch.randn(num_before + num_tokens, 2, 3, 16).to(dtype)
    before = backend.plan([QueryRange(0, num_before, 0, sequence.table)])
    parts = (q_TKGD[first], sequence.k_SKD[first], sequence.v_SKD[first])
    backend.attend(before, *parts, world.layer, world.scale)
    plan = backend.plan([QueryRange(0, num_tokens, num_before, sequence.table)])
    rest = slice(num_before, None)
    parts = (q_TKGD[rest], sequence.k_SKD[rest], sequence.v_SKD[rest])
    return lambda: backend.attend(plan, *parts, world.layer, world.scale)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_overtakes_attention_changes_no_bit_of_it(
    native: NativeAttention, dtype: torch.dtype, num_threads: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        # Few rows after many keys, which are cut by keys where there are threads for it, and many rows.
        calls = [attention_of(native, num, 3000, dtype, seed) for seed, num in enumerate((5, 900))]
        others = [attention_of(native, num, 2500, dtype, 7 + seed) for seed, num in enumerate((1, 300))]
        expected, expected_of_others = [call() for call in calls], [other() for other in others]
    finally:
        torch.set_num_threads(threads)
    rng = random.Random(0)

    def work() -> None:
        index = rng.randrange(2)
        assert torch.equal(others[index](), expected_of_others[index])

    for call, out_THD in zip(calls, expected, strict=True):
        points = DrawnPoints(work, rng)
        for _ in range(4):
            with native.looking(points):
                assert torch.equal(call(), out_THD)
        assert points.num_looks >= points.num_overtaken > 1 and points.num_agreed == 0
        num_looks = points.num_looks
        call()
        assert points.num_looks == num_looks, "a point outside"


def test_a_unit_of_work_is_left_at_any_partition_of_its_keys(native: NativeAttention) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call = attention_of(native, 3, 6000, torch.float32, 0)
        out_THD = call()
        points = DrawnPoints(lambda: None, random.Random(0))
        with native.looking(points):
            assert torch.equal(call(), out_THD)
    finally:
        torch.set_num_threads(threads)
    assert points.num_looks >= 8  # six partitions of each of two heads


def test_attention_by_torch_has_points_between_rows() -> None:
    backend = AtenAttention()
    call = attention_of(backend, 700, 200, torch.float32, 0)
    out_THD = call()
    points = DrawnPoints(lambda: None, random.Random(0))
    with backend.looking(points):
        found_THD = call()
    assert points.num_looks >= 5 and points.num_overtaken
    assert torch.allclose(found_THD, out_THD, atol=1e-5)  # torch's sums depend on the number of rows


@pytest.mark.parametrize("where", ["is_overtaken", "overtake"])
def test_an_error_at_a_point_comes_out_of_the_call(
    native: NativeAttention, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = attention_of(native, 900, 100, torch.float32, 0)
    out_THD = call()
    points = DrawnPoints(lambda: None, random.Random(0))
    monkeypatch.setattr(points, "is_overtaken", lambda: True)

    def fail() -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(points, where, fail)
    with pytest.raises(KeyError, match="a fault"), native.looking(points):
        call()
    assert torch.equal(call(), out_THD)
