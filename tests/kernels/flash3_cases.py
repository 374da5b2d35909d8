"""FlashAttention-3's backend over a fake of its package, and trials of kernels; Triton's part is interpreted.

Run by test_triton_kernels.py, in a process of its own.
"""

from __future__ import annotations

from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

use_interpreter()

import logging  # noqa: E402
import random  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_medha.core.errors import ConfigError  # noqa: E402
from megatron_medha.kernels.attention import reference  # noqa: E402
from megatron_medha.kernels.attention.backend import QueryRange  # noqa: E402
from megatron_medha.kernels.choose_backend import attention_backend, backend_names  # noqa: E402
from megatron_medha.kernels.flash.flash3_backend import Flash3Attention  # noqa: E402
from megatron_medha.kernels.kv.paged_kv import E4M3  # noqa: E402
from megatron_medha.kernels.kv.slot_table import SlotTable  # noqa: E402
from megatron_medha.kernels.triton.triton_backend import TritonAttention  # noqa: E402
from megatron_medha.worker.startup import attention_trials  # noqa: E402
from megatron_medha.worker.startup.attention_trials import AttentionHeads, Trial, tried_attention  # noqa: E402
from tests.kernels import fake_flash3  # noqa: E402
from tests.kernels.paged_world import BLOCK_SIZE, TOLERANCE, World  # noqa: E402

CPU = torch.device("cpu")
HEADS = AttentionHeads(1, 2, 16, torch.bfloat16, torch.bfloat16)
TRIALS = Trial(1, 6, 30), Trial(2, 1, 30)


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash3.install()
    fake_flash3.calls.clear()
    torch.manual_seed(0)
    random.seed(0)
    monkeypatch.setattr(attention_trials, "_CHECKED", (20, 5, 9))


def flash_world(group: int = 2) -> World:
    backend = attention_backend("flash_attn_3", CPU, group)
    return World(backend, num_kv_heads=2, group=group, head_dim=32, dtype=torch.bfloat16)


@pytest.mark.parametrize("group", [1, 4])
def test_flash_3_computes_a_mixed_batch_in_one_call(group: int) -> None:
    world = flash_world(group)
    long, short, fresh = world.add(300, [5, 1, 13]), world.add(40), world.add(20)
    world.step([(long, 200), (short, 9)])
    world.step([(short, 1), (long, 21), (fresh, 1)])
    world.step([(long, 1), (short, 1), (fresh, 17)])
    assert [call["num_sequences"] for call in fake_flash3.calls] == [2, 3, 3]
    assert all(call["causal"] and call["pack_gqa"] is (group > 1) for call in fake_flash3.calls)
    # The width of the table is what the longest sequence has, as the package's rule for splitting looks at it.
    assert [call["width"] for call in fake_flash3.calls] == [13, 14, 14]


def test_flash_3_lets_rows_of_another_ranks_shard_see_all_of_this_one() -> None:
    world = flash_world()
    one, empty, own = world.add(70), SlotTable(BLOCK_SIZE), world.add(30)
    world.step([(one, 70), (own, 12)])
    q, k, v = (torch.randn(31, 2, *rest, 32).to(torch.bfloat16) for rest in ((2,), (), ()))
    ranges = [
        QueryRange(0, 12, 70, one.table, False), QueryRange(12, 11, 12, own.table), QueryRange(23, 8, 0, empty, False),
    ]  # fmt: skip
    out, lse = world.backend.attend_with_lse(world.backend.plan(ranges), q, k, v, world.layer, world.scale)
    keys, values = torch.cat((own.k_SKD[:12], k[12:23])), torch.cat((own.v_SKD[:12], v[12:23]))
    cases = ((slice(0, 12), one.k_SKD, one.v_SKD, False), (slice(12, 23), keys, values, True))
    for rows, k_SKD, v_SKD, is_causal in cases:
        expected, expected_lse = reference.attention(
            q[rows].flatten(1, 2), k_SKD, v_SKD, world.scale, is_causal=is_causal
        )
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[torch.bfloat16]
        assert (lse[rows].double() - expected_lse).abs().max() < TOLERANCE[torch.bfloat16]
    assert not out[23:].any() and lse[23:].isneginf().all(), "a shard without a key counts for nothing"


@pytest.mark.parametrize(("counts", "has_chunks"), [((1, 1), False), ((1, 11), True), ((5, 1), True)])
def test_a_padded_plan_of_flash_3_says_what_the_plain_one_says(counts: tuple[int, int], has_chunks: bool) -> None:
    world = flash_world()
    sequences = [world.add(80), world.add(80)]
    world.step([(sequences[0], 40), (sequences[1], 7)])
    backend, room = world.backend, world.backend.room(16, 5, has_chunks=has_chunks)
    num_tokens = sum(counts)
    ranges = [
        QueryRange(sum(counts[:i]), count, sequences[i].num_computed, sequences[i].table)
        for i, count in enumerate(counts)
    ]
    q, k, v = (torch.randn(16, 2, *rest, 32).to(torch.bfloat16) for rest in ((2,), (), ()))
    plain = backend.attend(backend.plan(ranges), q[:num_tokens], k[:num_tokens], v[:num_tokens], world.layer, 0.2)
    if not has_chunks:
        with pytest.raises(ValueError, match="room for"):
            backend.padded(backend.host_plan([QueryRange(0, 2, 40, sequences[0].table)]), room)
        room = backend.room(6, 6, has_chunks=False)
    host = backend.padded(backend.host_plan(ranges), room)
    empty = backend.empty_plan(room)
    assert [(a.shape, a.dtype) for a in host.arrays[:-2]] == [(a.shape, a.dtype) for a in empty.arrays[:-2]]
    plan = backend.on_device(empty, [torch.from_numpy(array) for array in host.arrays], is_padded=True)
    rows = slice(0, room.num_tokens)
    out = backend.attend(plan, q[rows], k[rows], v[rows], world.layer, 0.2)
    assert torch.equal(out[:num_tokens], plain)
    assert not out[num_tokens:].any(), "rows that belong to nobody"


def test_what_flash_3_cannot_hold_is_refused() -> None:
    backend = Flash3Attention(CPU, group=1)
    with pytest.raises(ValueError, match="use triton"):
        backend.allocate(4, 128, 1, 64, E4M3)
    with pytest.raises(ValueError, match="head_dim=512"):
        backend.allocate(4, 128, 1, 512, torch.bfloat16)


def test_a_rehearsal_finds_flash_3_where_its_package_is() -> None:
    assert backend_names(CPU)[-2:] == ("triton", "flash_attn_3")


class Clock:
    """Says what was written down for each kind of work, in the order of the candidates; runs it once, too."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        return self.seconds.pop(0)


@pytest.mark.parametrize(("flash_s", "chosen"), [((2.0, 1.0), "flash_attn_3"), ((2.0, 3.0), "triton")])
def test_the_quicker_of_flash_3_and_triton_is_taken_and_the_log_says_how_to_pin_it(
    flash_s: tuple[float, float], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make = tried_attention(
        "auto", "auto", HEADS, CPU, seconds_of=Clock(*flash_s, 3.0, 1.0), agree=int, trials=TRIALS
    )
    assert make().name == chosen
    assert f"pin=model.attention_backend={chosen}" in caplog.text


def test_a_candidate_counts_as_its_slowest_rank() -> None:
    others = iter((1, -9_000_000_000, -9_000_000_000, 0, 0))  # has the package; seconds of flash, twice; of triton
    make = tried_attention(
        "auto", "auto", HEADS, CPU, seconds_of=Clock(1.0, 1.0, 3.0, 3.0), trials=TRIALS,
        agree=lambda value: min(value, next(others)),
    )  # fmt: skip
    assert make().name == "triton"


def test_fp8_kv_is_never_measured_on_flash_3() -> None:
    heads = HEADS._replace(kv_dtype=E4M3)
    make = tried_attention("auto", "auto", heads, CPU, seconds_of=Clock(1.0, 1.0), agree=int, trials=TRIALS)
    assert make().name == "triton"


def test_the_quickest_tile_of_each_kind_is_taken_and_a_wrong_or_broken_one_never(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron_medha.kernels.triton import triton_tiles
    from megatron_medha.kernels.triton.triton_attention import TileConfig

    wrong, broken, good, slow = (TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=n) for n in range(1, 5))
    monkeypatch.setattr(triton_tiles, "tiles_to_try", lambda device: ((wrong, broken, good, slow), (good,)))
    attend = TritonAttention.attend

    def attend_badly(self: TritonAttention, *arguments: Tensor) -> Tensor:
        if self.tiles.startswith(broken.name):
            raise RuntimeError("out of resource: shared memory")
        return attend(self, *arguments) * (0.5 if self.tiles.startswith(wrong.name) else 1.0)

    monkeypatch.setattr(TritonAttention, "attend", attend_badly)
    clock = Clock(2.0, 5.0, 1.0)  # of a chunk with the good one and the slow one, and of decodes
    make = tried_attention("triton", "auto", HEADS, CPU, seconds_of=clock, agree=int, trials=TRIALS)
    assert make().tiles == "16x16s3-cp,16x16s3-cp"
    assert "reason=ArithmeticError" in caplog.text and "out of resource" in caplog.text


def test_named_tiles_are_taken_and_unknown_ones_refused_with_those_there_are() -> None:
    make = tried_attention(
        "triton", "32x16s1-cp,32x16s1-cp", HEADS, CPU, seconds_of=Clock(1.0, 1.0), agree=int, trials=TRIALS
    )
    assert make().tiles == "32x16s1-cp,32x16s1-cp"
    with pytest.raises(ConfigError, match="of chunks: 32x16s1-cp"):
        tried_attention("triton", "64x64s5", HEADS, CPU, agree=int)


def test_where_no_kernel_is_right_torch_computes_or_the_rank_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_trials, "_TOLERANCE", -1.0)
    asked: list[str] = []
    monkeypatch.setattr(attention_trials, "attention_backend", lambda name, *rest: asked.append(name))
    tried_attention("auto", "auto", HEADS, CPU, seconds_of=Clock(), agree=int, trials=TRIALS)()
    assert asked[-1] == "torch"
    with pytest.raises(ConfigError, match="use attention_backend=torch"):
        tried_attention("triton", "auto", HEADS, CPU, seconds_of=Clock(), agree=int, trials=TRIALS)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_trial_on_a_whole_gpu_cuts_keys_so_that_merging_is_compiled(
    group: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_medha.kernels.triton.triton_tiles import DECODE_TILES, PREFILL_TILES

    parts: list[int] = []
    plan = TritonAttention.plan

    def noted(self: TritonAttention, ranges: list[QueryRange]) -> object:
        self._num_sms = 132
        host = self.host_plan(ranges)
        parts.append(host.decodes.num_parts if kind else host.chunks.num_parts)
        return plan(self, ranges)

    monkeypatch.setattr(TritonAttention, "plan", noted)
    monkeypatch.setattr(TritonAttention, "attend", lambda *arguments: None)
    heads = AttentionHeads(8, group, 16, torch.bfloat16, torch.bfloat16)
    for tile in (PREFILL_TILES, DECODE_TILES)[kind]:
        parts.clear()
        backend = TritonAttention(CPU, group=group, **{("prefill_tile", "decode_tile")[kind]: tile})
        trial = (attention_trials.CHUNK, attention_trials.DECODE)[kind]
        attention_trials._work(backend, trial, heads, CPU, None, False)
        assert max(parts) > 0


def test_kernels_with_log_sum_exp_run_at_load_where_kvp_ranks_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with_lse: list[bool] = []
    written = TritonAttention.attend_written

    def noted(self: TritonAttention, plan: Any, q: Tensor, layer: Any, scale: float, has_lse: bool, **rest: Any) -> Any:
        with_lse.append(has_lse)
        return written(self, plan, q, layer, scale, has_lse, **rest)

    monkeypatch.setattr(TritonAttention, "attend_written", noted)
    for has_lse in (False, True):
        with_lse.clear()
        tried_attention(
            "triton", "auto", HEADS, CPU, seconds_of=Clock(1.0, 1.0), agree=int, trials=TRIALS, has_lse=has_lse
        )
        assert (True in with_lse) is has_lse
