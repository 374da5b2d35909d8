"""The parts of the GPU check that look at single kernels: correct, and how fast beside the chip's own rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.gpu.measure import Check, Row, fill_with_random_kv
from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import QueryRange
from megatron_medha.kernels.attention.flash_backend import FlashAttention
from megatron_medha.kernels.choose_backend import backend_names
from megatron_medha.kernels.kv.paged_kv import E4M3, PagedKV
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.triton.triton_attention import TileConfig
from megatron_medha.kernels.triton.triton_backend import TritonAttention
from megatron_medha.kernels.triton.triton_tiles import DECODE_TILES, INTERPRETED_TILE, PREFILL_TILES
from megatron_medha.model.fp8 import ScaledLinear

_HEADS, _GROUP, _HEAD_DIM = 8, 4, 128  # Llama-3 8B
_SCALE = _HEAD_DIM**-0.5


def rates(check: Check) -> None:
    """The chip's own: a large bf16 product, and a copy."""
    size, num_bytes = (64, 1 << 16) if check.is_tiny else (8192, 4 << 30)
    a, b = torch.randn(2, size, size, device=check.device).bfloat16()
    flops = 2 * size**3 / check.time_s(lambda: a @ b, budget_s=0.5)
    check.facts["matmul_flops_per_s"] = flops
    check.add(Row("bf16 matmul 8192^3", flops / 1e12, "TFLOP/s"))
    source = torch.empty(num_bytes, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    rate = 2 * num_bytes / check.time_s(lambda: target.copy_(source), budget_s=0.3)
    check.facts["copy_bytes_per_s"] = rate
    check.add(Row("device copy, read + write", rate / 1e12, "TB/s"))


class OneLayer:
    """One layer's pool with sequences whose earlier KV is random and in place."""

    def __init__(
        self, check: Check, lengths: Sequence[int], backend: TritonAttention | FlashAttention, kv_dtype: torch.dtype
    ) -> None:
        """lengths: tokens each sequence will have in all."""
        size = backend.block_size if check.is_cuda else 16
        blocks = [-(-length // size) for length in lengths]
        self.heads, self.group, self.dim = (1, 2, 32) if check.is_tiny else (_HEADS, _GROUP, _HEAD_DIM)
        self.backend, self.device = backend, check.device
        self.layer: PagedKV = backend.allocate(sum(blocks), size, self.heads, self.dim, kv_dtype)
        fill_with_random_kv(self.layer)
        self.tables = []
        first = 0
        for count in blocks:
            table = SlotTable(size)
            table.append([(first, count)])
            self.tables.append(table)
            first += count

    def queries(self, num_tokens: int) -> Tensor:
        """Random, [T, K, G, D]."""
        return torch.randn(num_tokens, self.heads, self.group, self.dim, device=self.device).bfloat16()


def correctness(check: Check) -> None:
    """Every kernel, every tile, against plain attention in fp64; what was written is read back as well."""
    torch.manual_seed(check.seed)
    if check.is_cuda:
        tiles: list[tuple[TileConfig, TileConfig]] = [(tile, DECODE_TILES[0]) for tile in PREFILL_TILES]
        tiles += [(PREFILL_TILES[0], tile) for tile in DECODE_TILES]
    else:
        tiles = [(INTERPRETED_TILE, INTERPRETED_TILE)]
    for index, (prefill_tile, decode_tile) in enumerate(tiles):
        for kv_dtype in (torch.bfloat16, E4M3):
            if not check.is_cuda and kv_dtype == E4M3:
                continue  # the tests interpret it
            backend = TritonAttention(
                check.device, group=2 if check.is_tiny else _GROUP, prefill_tile=prefill_tile, decode_tile=decode_tile
            )
            error = _attention_error(check, backend, kv_dtype)
            name = str(kv_dtype).removeprefix("torch.")
            # bf16 results: 2^-8 of outputs up to 2 and the weights' own rounding.
            check.add(Row(f"attention error, {name} KV, tile set {index}", error, "abs", 2e-2, True))
    for library in ("flash_attn", "torch"):
        if check.is_cuda and library in backend_names(check.device):
            error = _attention_error(check, FlashAttention(check.device, library=library), torch.bfloat16)
            check.add(Row(f"attention error, {library}", error, "abs", 2e-2, True))


def _attention_error(check: Check, backend: TritonAttention | FlashAttention, kv_dtype: torch.dtype) -> float:
    """A mixed batch over histories of unequal length; the pool as it is after the write is what is attended to."""
    work = [(20, 5), (33, 1), (0, 9)] if check.is_tiny else [(5000, 200), (70_000, 1), (0, 300), (900, 1), (2047, 64)]
    world = OneLayer(check, [start + count for start, count in work], backend, kv_dtype)
    num_tokens = sum(count for _, count in work)
    q = world.queries(num_tokens)
    k, v = (torch.randn(num_tokens, world.heads, world.dim, device=check.device).bfloat16() for _ in range(2))
    ranges, row = [], 0
    for (start, count), table in zip(work, world.tables, strict=True):
        ranges.append(QueryRange(row, count, start, table))
        row += count
    scale = world.dim**-0.5
    out, lse = backend.attend_with_lse(backend.plan(ranges), q, k, v, world.layer, scale)
    error = 0.0
    size = world.layer.block_size
    for r in ranges:
        slots = torch.from_numpy(r.table.slots(0, r.start + r.num_rows)).to(check.device)
        held = []
        for pool, scales in (
            (world.layer.k_NKPD, world.layer.k_scale_NK), (world.layer.v_NKPD, world.layer.v_scale_NK)
        ):  # fmt: skip
            # As bytes: not every torch picks rows of e4m3.
            stored = pool.view(torch.uint8) if scales is not None else pool
            values = stored.transpose(1, 2)[slots // size, slots % size].view(pool.dtype).float()
            held.append(values if scales is None else values * scales[slots // size][..., None])
        rows = slice(r.first_row, r.first_row + r.num_rows)
        if not world.layer.is_quantised:
            error = max(error, (held[0][r.start :] - k[rows].float()).abs().max().item())
        # Head by head: the fp64 scores of a long prefix would not fit otherwise.
        for head in range(world.heads):
            expected, expected_lse = reference.attention(
                q[rows, head], held[0][:, head : head + 1], held[1][:, head : head + 1], scale, is_causal=True
            )
            columns = slice(head * world.group, (head + 1) * world.group)
            error = max(error, (out[rows, columns].double() - expected).abs().max().item())
            error = max(error, (lse[rows, columns].double() - expected_lse).abs().max().item())
    return error


def attention(check: Check) -> None:
    """Chunks over long prefixes: share of the measured matmul rate, and against raw flash kernels there."""
    chunks, prefixes = ([8], [40]) if check.is_tiny else ([64, 128, 512, 2048], [32_768, 131_072, 524_288])
    tiles = PREFILL_TILES if check.is_cuda else (INTERPRETED_TILE,)
    flash_names = [name for name in ("flash_attn", "torch") if check.is_cuda and name in backend_names(check.device)]
    best_tile: dict[int, int] = {}
    for prefix in prefixes:
        for chunk in chunks:
            if not check.has_time(10):
                check.add(Row(f"attention {chunk} over {prefix}: no time left", math.nan, ""))
                continue
            flops = 4 * chunk * (prefix + chunk / 2) * _HEADS * _GROUP * _HEAD_DIM
            times = []
            backend = _triton(check)
            world = OneLayer(check, [prefix + chunk], backend, torch.bfloat16)
            q, layer = world.queries(chunk), world.layer
            for tile in tiles:
                backend.use_tiles(prefill_tile=tile)
                plan = backend.plan([QueryRange(0, chunk, prefix, world.tables[0])])
                work = partial(backend.attend_written, plan, q, layer, _SCALE, False)
                times.append(check.time_s(work))
            del world, layer, work
            best = min(range(len(times)), key=times.__getitem__)
            best_tile[best] = best_tile.get(best, 0) + 1
            share = flops / times[best] / check.facts.get("matmul_flops_per_s", math.nan)
            note = f" tile {best}; all: {', '.join(f'{1e3 * s:.3f} ms' for s in times)}"
            bar = 0.6 if chunk == 64 else 0.7
            check.add(Row(f"attention {chunk} over {prefix}: of matmul rate", share, "", bar, note=note))
            raw: dict[str, float] = {}
            for name in flash_names:
                raw |= _raw_flash_s(check, name, prefix, chunk)
            if raw:
                ratio = times[best] / min(raw.values())
                note = " " + ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in raw.items())
                check.add(
                    Row(f"attention {chunk} over {prefix}: time against best raw flash", ratio, "x", 1.05, True, note)
                )
    check.facts.update({f"prefill_tile_{index}_wins": float(count) for index, count in best_tile.items()})


def _raw_flash_s(check: Check, library: str, prefix: int, chunk: int) -> dict[str, float]:
    """Seconds of a library's own kernels over contiguous KV, without our plumbing; one that refuses says so."""
    total = prefix + chunk
    q = torch.randn(chunk, _HEADS * _GROUP, _HEAD_DIM, device=check.device).bfloat16()
    k, v = (torch.randn(total, _HEADS, _HEAD_DIM, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {}
    if library == "torch":
        # No causal mask between unequal lengths there; the tail's triangle is at most 3% of the work.
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))

        def attend(kernel: SDPBackend) -> None:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        calls["torch"] = partial(attend, SDPBackend.FLASH_ATTENTION)
        calls["cudnn"] = partial(attend, SDPBackend.CUDNN_ATTENTION)
    else:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        bounds = [torch.tensor([0, n], dtype=torch.int32, device=check.device) for n in (chunk, total)]
        lengths = torch.tensor([total], dtype=torch.int32, device=check.device)
        calls["flash_attn"] = lambda: flash_attn_varlen_func(
            q, k, v, *bounds, chunk, total, softmax_scale=_SCALE, causal=True
        )
        calls["flash_attn, keys split"] = lambda: flash_attn_with_kvcache(
            q[None], k[None], v[None], cache_seqlens=lengths, softmax_scale=_SCALE, causal=True
        )
    seconds = {}
    for name, call in calls.items():
        try:
            seconds[name] = check.time_s(call)
        except (RuntimeError, TypeError) as error:
            print(f"raw {name} over {prefix} + {chunk}: {str(error).splitlines()[0]}", flush=True)
    return seconds


def decode(check: Check) -> None:
    """Single tokens: share of the copy bandwidth, keys and values counted once."""
    cases = [(1, 40), (3, 20)] if check.is_tiny else [
        (1, 8192), (32, 8192), (1, 65_536), (1, 262_144), (32, 262_144), (1, 1_048_576)
    ]  # fmt: skip
    tiles = DECODE_TILES if check.is_cuda else (INTERPRETED_TILE,)
    kv_dtypes = (torch.bfloat16, E4M3) if check.is_cuda else (torch.bfloat16,)
    for batch, context in cases:
        for kv_dtype in kv_dtypes:
            if not check.has_time(10):
                check.add(Row(f"decode {batch} x {context}: no time left", math.nan, ""))
                continue
            times = []
            backend = _triton(check)
            world = OneLayer(check, [context] * batch, backend, kv_dtype)
            ranges = [QueryRange(i, 1, context - 1, table) for i, table in enumerate(world.tables)]
            q, layer = world.queries(batch), world.layer
            for tile in tiles:
                backend.use_tiles(decode_tile=tile)
                plan = backend.plan(ranges)
                # In a model other layers have been through the cache since.
                work = partial(backend.attend_written, plan, q, layer, _SCALE, False)
                times.append(check.time_s(work, is_cold=True))
            del world, layer, work
            best = min(range(len(times)), key=times.__getitem__)
            num_bytes = 2 * batch * context * _HEADS * _HEAD_DIM * kv_dtype.itemsize
            share = num_bytes / times[best] / check.facts.get("copy_bytes_per_s", math.nan)
            name = str(kv_dtype).removeprefix("torch.")
            note = f" tile {best}; all: {', '.join(f'{1e6 * s:.0f} us' for s in times)}"
            bar = 0.85 if context >= 262_144 and kv_dtype == torch.bfloat16 else None
            check.add(Row(f"decode {batch} x {context} {name}: of copy bandwidth", share, "", bar, note=note))


def linear(check: Check) -> None:
    """FP8 linear layers of the 8B shape at 2,048 tokens against bf16, quantisation of the input included."""
    shapes = [(64, 48)] if check.is_tiny else [(4096, 6144), (4096, 4096), (4096, 28_672), (14_336, 4096)]
    num_tokens = 32 if check.is_tiny else 2048
    totals = {"bf16": 0.0, "torch_scaled_mm": 0.0, "transformer_engine": 0.0}
    te = _transformer_engine(check)
    for num_in, num_out in shapes:
        x = torch.randn(num_tokens, num_in, device=check.device).bfloat16()
        weight = torch.randn(num_out, num_in, device=check.device).bfloat16()
        scaled = ScaledLinear(weight, None)
        exact = x.float() @ weight.float().t()
        error = ((scaled(x)[0].float() - exact).norm() / exact.norm()).item()
        # 1/40 per operand in the mean square.
        check.add(Row(f"FP8 product {num_in} x {num_out}: error", error, "rel", 0.05, True))
        totals["bf16"] += check.time_s(lambda x=x, w=weight: F.linear(x, w))
        totals["torch_scaled_mm"] += check.time_s(lambda x=x, f=scaled: f(x))
        if te is not None:
            totals["transformer_engine"] += te(check, x, weight)
    for name in ("torch_scaled_mm", "transformer_engine"):
        if totals[name]:
            speed_up = totals["bf16"] / totals[name]
            check.add(Row(f"FP8 linear layers by {name}, {num_tokens} tokens: speed-up", speed_up, "x", 1.6))


def _transformer_engine(check: Check):  # noqa: ANN202
    """A function that times one TE layer in FP8, or None where it is not usable."""
    from megatron_medha.model.build import transformer_engine_works

    if not transformer_engine_works(check.device):
        print("Transformer Engine: not usable here", flush=True)
        return None
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    def time_layer(check: Check, x: Tensor, weight: Tensor) -> float:
        layer = te.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=torch.bfloat16, device=x.device)
        layer.weight.data.copy_(weight)
        is_first = [True]

        def forward() -> None:
            with torch.no_grad(), te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
                layer(x, is_first_microbatch=is_first[0])
            is_first[0] = False

        return check.time_s(forward)

    return time_layer


def _triton(check: Check, **tiles: TileConfig) -> TritonAttention:
    if not check.is_cuda and not check.is_tiny:
        raise ConfigError("full sizes on a CPU would take days; use --tiny")
    return TritonAttention(check.device, group=2 if check.is_tiny else _GROUP, **tiles)
