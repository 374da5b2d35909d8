"""The parts of the GPU check that look at single kernels: correct, and how fast beside the chip's own rates."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.gpu.measure import Check, Row, fill_with_random_kv
from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.choose_backend import attention_backend, backend_names
from megatron_medha.kernels.kv.paged_kv import E4M3
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.kernels.triton.triton_attention import TileConfig
from megatron_medha.kernels.triton.triton_backend import TritonAttention
from megatron_medha.kernels.triton.triton_tiles import DECODE_TILES, INTERPRETED_TILE, PREFILL_TILES
from megatron_medha.model.fp8 import ScaledLinear

_HEADS, _GROUP, _HEAD_DIM = 8, 4, 128  # Llama-3 8B
_SCALE = _HEAD_DIM**-0.5


def rates(check: Check) -> None:
    """The chip's own: a large bf16 product, and a copy."""
    check.case("bf16 products", 30, partial(_matmul_rate, check))
    check.case("copies", 30, partial(_copy_rate, check))


def _matmul_rate(check: Check) -> None:
    size = 64 if check.is_tiny else 8192
    a, b = torch.randn(2, size, size, device=check.device).bfloat16()
    flops = 2 * size**3 / check.time_s(lambda: a @ b, budget_s=0.5)
    check.note("matmul_flops_per_s", flops)
    check.add(Row("bf16 matmul 8192^3", flops / 1e12, "TFLOP/s"))


def _copy_rate(check: Check) -> None:
    source = torch.empty(1 << 16 if check.is_tiny else 4 << 30, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / check.time_s(lambda: target.copy_(source), budget_s=0.3)
    check.note("copy_bytes_per_s", rate)
    check.add(Row("device copy, read + write", rate / 1e12, "TB/s"))


class Variant(NamedTuple):
    """A pair of tiles and what the pool holds."""

    name: str
    prefill_tile: TileConfig
    decode_tile: TileConfig
    kv_dtype: torch.dtype


def variants(check: Check) -> list[Variant]:
    """Every tile with every kind of KV; those that serve come first."""
    if not check.is_cuda:
        return [Variant("interpreted bfloat16", INTERPRETED_TILE, INTERPRETED_TILE, torch.bfloat16)]
    pairs = [(PREFILL_TILES[0], DECODE_TILES[0])]
    pairs += [(tile, DECODE_TILES[0]) for tile in PREFILL_TILES[1:]]
    pairs += [(PREFILL_TILES[0], tile) for tile in DECODE_TILES[1:]]
    return [
        Variant(f"{named(chunk)} | {named(single)}, {str(dtype).removeprefix('torch.')}", chunk, single, dtype)
        for chunk, single in pairs
        for dtype in (torch.bfloat16, E4M3)
    ]


def named(tile: TileConfig) -> str:
    """As in 64x64s5."""
    way = "" if tile.has_tma else "-cp"
    return f"{tile.block_m}x{tile.block_n}s{tile.num_stages}{way}"


def compile(check: Check) -> None:  # noqa: A001  # the part's name
    """Every variant once, in processes of their own that leave it in Triton's cache: the others then find it there."""
    check.case("all variants at once", 120, partial(_compile_all, check))


def _compile_all(check: Check) -> None:
    started_s = time.monotonic()
    size = "tiny" if check.is_tiny else "full"
    count = len(variants(check))
    begun = [
        subprocess.Popen([sys.executable, "-m", "experiments.gpu.compile_variant", check.device.type, size, str(index)])
        for index in range(count)
    ]
    try:
        codes = [process.wait(timeout=max(1.0, 110 - (time.monotonic() - started_s))) for process in begun]
    finally:
        for process in begun:
            process.kill()
    num_failed = float(sum(map(bool, codes)))
    check.add(Row("variants that did not compile or launch", num_failed, "", 0.0, True, f" of {count}"))
    check.add(Row("compiling, all at once", time.monotonic() - started_s, "s"))


class OneLayer:
    """One layer's pool with sequences whose earlier KV is random and in place."""

    def __init__(
        self, check: Check, lengths: Sequence[int], backend: AttentionBackend, kv_dtype: torch.dtype
    ) -> None:
        """lengths: tokens each sequence will have in all."""
        size = backend.block_size if check.is_cuda else 16
        blocks = [-(-length // size) for length in lengths]
        self.heads, self.group, self.dim = (1, 2, 32) if check.is_tiny else (_HEADS, _GROUP, _HEAD_DIM)
        self.backend, self.device = backend, check.device
        self.layer: Any = backend.allocate(sum(blocks), size, self.heads, self.dim, kv_dtype)
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
    for variant in variants(check):
        check.case(variant.name, 40, partial(_correctness, check, variant))
    for window, cap, sinks in ((100, None, True), (100, 5.0, False)):
        name = f"window {window}{', sinks' if sinks else ''}{'' if cap is None else ', capped scores'}"
        check.case(name, 40, partial(_special_correctness, check, name, window, cap, sinks))
    check.case("latent vectors of 576", 40, partial(_latent_correctness, check))
    for library in ("flash_attn_3", "flash_attn", "torch"):
        if check.is_cuda and library in backend_names(check.device):
            check.case(library, 40, partial(_library_correctness, check, library))


def _correctness(check: Check, variant: Variant) -> None:
    torch.manual_seed(check.seed)
    backend = _triton(check, prefill_tile=variant.prefill_tile, decode_tile=variant.decode_tile)
    error = _attention_error(check, backend, variant.kv_dtype)
    # bf16 results: 2^-8 of outputs up to 2 and the weights' own rounding.
    check.add(Row(f"attention error, {variant.name}", error, "abs", 2e-2, True))


def _library_correctness(check: Check, library: str) -> None:
    torch.manual_seed(check.seed)
    error = _attention_error(check, attention_backend(library, check.device, group=_GROUP), torch.bfloat16)
    check.add(Row(f"attention error, {library}", error, "abs", 2e-2, True))


def _special_correctness(check: Check, name: str, window: int, cap: float | None, has_sinks: bool) -> None:
    """Layers as in gpt-oss and Gemma, a chunk and a decode, against scores written out."""
    torch.manual_seed(check.seed)
    backend = _triton(check)
    backend.score_cap = cap
    num_tokens = 40 if check.is_tiny else 700
    world = OneLayer(check, [num_tokens + 1], backend, torch.bfloat16)
    k, v = (torch.randn(num_tokens + 1, world.heads, world.dim, device=check.device).bfloat16() for _ in range(2))
    sinks = torch.randn(world.heads * world.group, device=check.device) if has_sinks else None
    error = 0.0
    for start, count in ((0, num_tokens), (num_tokens, 1)):
        q = world.queries(count)
        plan = backend.plan([QueryRange(0, count, start, world.tables[0], lowest_key=start + 1 - window)])
        rows = slice(start, start + count)
        out = backend.attend(plan, q, k[rows], v[rows], world.layer, _SCALE, sinks)
        seen_k, seen_v = (x[: start + count].double().repeat_interleave(world.group, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q.flatten(1, 2).double(), seen_k) * _SCALE
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        last = torch.arange(start, start + count, device=check.device)[:, None]
        key = torch.arange(start + count, device=check.device)
        scores = scores.masked_fill((key > last) | (key <= last - window), -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), -1)
        expected = torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : start + count], seen_v)
        error = max(error, (out.double() - expected).abs().max().item())
    check.add(Row(f"attention error, {name}", error, "abs", 2e-2, True))


def _latent_correctness(check: Check) -> None:
    """DeepSeek's: one key for 64 heads, of which the value is a part."""
    torch.manual_seed(check.seed)
    group, dim, num_tokens = (40, 48, 20) if check.is_tiny else (64, 576, 700)
    backend = TritonAttention(check.device, group=group)
    size = backend.block_size if check.is_cuda else 16
    layer = backend.allocate(8, size, 1, dim, torch.bfloat16)
    table = SlotTable(size)
    table.append([(1, 7)])
    latent = torch.randn(num_tokens + 1, 1, dim, device=check.device).bfloat16()
    error = 0.0
    for start, count in ((0, num_tokens), (num_tokens, 1)):
        q = torch.randn(count, 1, group, dim, device=check.device).bfloat16()
        kv = latent[start : start + count]
        plan = backend.plan([QueryRange(0, count, start, table)])
        out = backend.attend(plan, q, kv, kv, layer, dim**-0.5)
        seen = latent[: start + count]
        expected, _ = reference.attention(q.flatten(1, 2), seen, seen, dim**-0.5, is_causal=True)
        error = max(error, (out.double() - expected).abs().max().item())
    check.add(Row(f"attention error, latent vectors of {dim}", error, "abs", 2e-2, True))


def _attention_error(check: Check, backend: AttentionBackend, kv_dtype: torch.dtype) -> float:
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
    """Chunks over 128K: share of the measured matmul rate, and against raw flash kernels there."""
    prefix, chunks = (40, [8]) if check.is_tiny else (131_072, [512, 2048, 128])
    for chunk in chunks:
        check.case(f"{chunk} over {prefix}", 30, partial(_chunk_row, check, prefix, chunk))


def more(check: Check) -> None:
    """The other lengths."""
    pairs = [] if check.is_tiny else [(64, 131_072), *((c, p) for p in (32_768, 524_288) for c in (64, 128, 512, 2048))]
    for chunk, prefix in pairs or [(4, 30)]:
        check.case(f"chunks: {chunk} over {prefix}", 40, partial(_chunk_row, check, prefix, chunk))
    cases = [(2, 30)] if check.is_tiny else [(1, 8192), (32, 8192), (1, 65_536), (1, 1_048_576)]
    for batch, context in cases:
        for kv_dtype in _kv_dtypes(check):
            name = f"decodes: {batch} x {context}, {str(kv_dtype).removeprefix('torch.')}"
            check.case(name, 40, partial(_decode_row, check, batch, context, kv_dtype))


def _chunk_row(check: Check, prefix: int, chunk: int) -> None:
    tiles = PREFILL_TILES if check.is_cuda else (INTERPRETED_TILE,)
    flops = 4 * chunk * (prefix + chunk / 2) * _HEADS * _GROUP * _HEAD_DIM
    backend = _triton(check)
    world = OneLayer(check, [prefix + chunk], backend, torch.bfloat16)
    q, layer = world.queries(chunk), world.layer
    times: dict[str, float] = {}
    for tile in tiles:
        backend.use_tiles(prefill_tile=tile)
        plan = backend.plan([QueryRange(0, chunk, prefix, world.tables[0])])
        work = partial(backend.attend_written, plan, q, layer, _SCALE, False)
        _timed(check, times, named(tile), work)
    del world, layer, work
    best = min(times, key=times.__getitem__)
    share = flops / times[best] / check.facts.get("matmul_flops_per_s", math.nan)
    note = f" {best}; all: {', '.join(f'{name} {1e3 * s:.3f} ms' for name, s in times.items())}"
    bar = 0.6 if chunk == 64 else 0.7
    check.add(Row(f"attention {chunk} over {prefix}: of matmul rate", share, "", bar, note=note))
    raw: dict[str, float] = {}
    for name in ("flash_attn_3", "flash_attn", "torch"):
        if check.is_cuda and name in backend_names(check.device):
            raw |= _raw_flash_s(check, name, prefix, chunk)
    if raw:
        ratio = times[best] / min(raw.values())
        note = " " + ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in raw.items())
        check.add(Row(f"attention {chunk} over {prefix}: time against best raw flash", ratio, "x", 1.05, True, note))


def _timed(check: Check, times: dict[str, float], name: str, work: Callable[[], Any], **how: Any) -> None:
    """One more time, or a line that says why not: a tile that does not launch leaves the others their row."""
    try:
        times[name] = check.time_s(work, **how)
    except Exception as error:  # of Triton's, torch's or a library's own types
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)


def _raw_flash_s(check: Check, library: str, prefix: int, chunk: int) -> dict[str, float]:
    """Seconds of a library's own kernels over contiguous KV, without our plumbing; one that refuses says so."""
    total = prefix + chunk
    q = torch.randn(chunk, _HEADS * _GROUP, _HEAD_DIM, device=check.device).bfloat16()
    k, v = (torch.randn(total, _HEADS, _HEAD_DIM, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {}
    if library == "flash_attn_3":
        from flash_attn_interface import flash_attn_func

        calls["flash_attn_3"] = lambda: flash_attn_func(q[None], k[None], v[None], softmax_scale=_SCALE, causal=True)
    elif library == "torch":
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
    seconds: dict[str, float] = {}
    for name, call in calls.items():
        _timed(check, seconds, name, call)
    return seconds


def decode(check: Check) -> None:
    """Single tokens: share of the copy bandwidth, keys and values counted once."""
    for batch, context in [(1, 40), (3, 20)] if check.is_tiny else [(1, 262_144), (32, 8192), (32, 262_144)]:
        for kv_dtype in _kv_dtypes(check):
            name = f"{batch} x {context}, {str(kv_dtype).removeprefix('torch.')}"
            check.case(name, 30, partial(_decode_row, check, batch, context, kv_dtype))


def _kv_dtypes(check: Check) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, E4M3) if check.is_cuda else (torch.bfloat16,)


def _decode_row(check: Check, batch: int, context: int, kv_dtype: torch.dtype) -> None:
    tiles = DECODE_TILES if check.is_cuda else (INTERPRETED_TILE,)
    backend = _triton(check)
    world = OneLayer(check, [context] * batch, backend, kv_dtype)
    ranges = [QueryRange(i, 1, context - 1, table) for i, table in enumerate(world.tables)]
    q, layer = world.queries(batch), world.layer
    times: dict[str, float] = {}
    for tile in tiles:
        backend.use_tiles(decode_tile=tile)
        plan = backend.plan(ranges)
        # In a model other layers have been through the cache since.
        work = partial(backend.attend_written, plan, q, layer, _SCALE, False)
        _timed(check, times, named(tile), work, is_cold=True)
    best = min(times, key=times.__getitem__)
    num_bytes = 2 * batch * context * _HEADS * _HEAD_DIM * kv_dtype.itemsize
    share = num_bytes / times[best] / check.facts.get("copy_bytes_per_s", math.nan)
    name = str(kv_dtype).removeprefix("torch.")
    note = f" {best}; all: {', '.join(f'{name} {1e6 * s:.0f} us' for name, s in times.items())}"
    bar = 0.85 if context >= 262_144 and kv_dtype == torch.bfloat16 else None
    check.add(Row(f"decode {batch} x {context} {name}: of copy bandwidth", share, "", bar, note=note))


def linear(check: Check) -> None:
    """FP8 linear layers of the 8B shape at 2,048 tokens against bf16, quantisation of the input included."""
    check.case("torch_scaled_mm", 30, partial(_linear_row, check, "torch_scaled_mm", _time_scaled))
    if (te := _transformer_engine(check)) is not None:
        check.case("transformer_engine", 60, partial(_linear_row, check, "transformer_engine", te))


def _linear_row(check: Check, name: str, time_layer: Callable[[Check, Tensor, Tensor], float]) -> None:
    shapes = [(64, 48)] if check.is_tiny else [(4096, 6144), (4096, 4096), (4096, 28_672), (14_336, 4096)]
    num_tokens = 32 if check.is_tiny else 2048
    plain_s = fp8_s = 0.0
    for num_in, num_out in shapes:
        x = torch.randn(num_tokens, num_in, device=check.device).bfloat16()
        weight = torch.randn(num_out, num_in, device=check.device).bfloat16()
        plain_s += check.time_s(lambda x=x, w=weight: F.linear(x, w))
        fp8_s += time_layer(check, x, weight)
    check.add(Row(f"FP8 linear layers by {name}, {num_tokens} tokens: speed-up", plain_s / fp8_s, "x", 1.6))


def _time_scaled(check: Check, x: Tensor, weight: Tensor) -> float:
    scaled = ScaledLinear(weight, None)
    exact = x.float() @ weight.float().t()
    error = ((scaled(x)[0].float() - exact).norm() / exact.norm()).item()
    # 1/40 per operand in the mean square.
    check.add(Row(f"FP8 product {weight.shape[1]} x {weight.shape[0]}: error", error, "rel", 0.05, True))
    return check.time_s(lambda: scaled(x))


def _transformer_engine(check: Check) -> Callable[[Check, Tensor, Tensor], float] | None:
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
    """Of the 8B's heads."""
    if not check.is_cuda and not check.is_tiny:
        raise ConfigError("full sizes on a CPU would take days; use --tiny")
    return TritonAttention(check.device, group=2 if check.is_tiny else _GROUP, **tiles)
