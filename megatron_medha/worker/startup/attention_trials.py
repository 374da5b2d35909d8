"""Which attention kernels a GPU rank uses: each candidate computes a small batch, and those that are right are timed.

FlashAttention-3 against the Triton kernels, and Triton's tiles against one another. Times decide, so that two starts
may choose differently, and the bits of outputs with them: the choice is logged, is in /version, and is pinned by
model.attention_backend and model.attention_tiles. All ranks take the same: a candidate counts as its slowest rank's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch

from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.block_pool import num_blocks_for
from megatron_medha.kernels.attention import reference
from megatron_medha.kernels.attention.backend import AttentionBackend, QueryRange
from megatron_medha.kernels.choose_backend import attention_backend, backend_names
from megatron_medha.kernels.kv.slot_table import SlotTable
from megatron_medha.parallel.groups import min_over_ranks

log = logging.getLogger(__name__)

_FLASH, _TRITON, _LAST = "flash_attn_3", "triton", "torch"
_MAX_TRIED_HEAD_DIM = 128
_NUM_RUNS = 5
_FEW_ROWS, _LONG_ROWS = 17, 1024
_CHECKED = (300, 40, 150)  # tokens of a sequence and its chunk after them, and of one that decodes
_NEVER_NS = 1 << 62
# What KV in so many bits may change in outputs of about 0.1; a kernel that reads the wrong keys is off by ten times.
_TOLERANCE, _TOLERANCE_FP8 = 0.03, 0.15


class Trial(NamedTuple):
    """A batch to be timed: sequences of equal length, each with so many new rows."""

    num_sequences: int
    num_rows: int
    context: int


CHUNK, DECODE = Trial(1, 512, 16_384), Trial(8, 1, 16_384)

MakeBackend = Callable[[], AttentionBackend]
Agree = Callable[[int], int]  # the smallest of all ranks' values
Seconds = Callable[[Callable[[], object]], float]  # of a piece of work that has run before


class AttentionCandidate(NamedTuple):
    """One way to compute attention."""

    label: str
    make: MakeBackend


class AttentionHeads(NamedTuple):
    """What kernels are compiled for."""

    num_kv_heads: int
    group: int  # query heads per key/value head
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


def has_trials(backend: AttentionBackend, device: torch.device) -> bool:
    """Whether there is something to try in place of this backend."""
    return device.type == "cuda" and backend.name in (_FLASH, _TRITON)


def tried_attention(
    name: str,
    tiles: str,
    heads: AttentionHeads,
    device: torch.device,
    *,
    block_size: int | None = None,
    has_lse: bool = False,
    score_cap: float | None = None,
    only_triton: bool = False,
    seconds_of: Seconds | None = None,
    agree: Agree = min_over_ranks,
    trials: tuple[Trial, Trial] = (CHUNK, DECODE),
) -> MakeBackend:
    """Makes the backend that is right and quickest on every rank. Collective.

    name, tiles: model.attention_backend and model.attention_tiles; what they name is not measured, only checked and
    compiled. block_size: None: each backend's own. has_lse: kernels with log-sum-exp are to be compiled, too, as kvp
    ranks need them. Raises ConfigError where what is named does not work, and for tiles that there are none of.
    """
    from megatron_medha.kernels.triton.triton_backend import TritonAttention
    from megatron_medha.kernels.triton.triton_tiles import tiles_called, tiles_to_try

    try:
        named = tiles_to_try(device) if tiles == "auto" else tiles_called(tiles, device)
    except ValueError as error:
        raise ConfigError(f"model.attention_tiles={tiles}: {error}") from error
    # None: wide heads have tiles of their own, which the backend chooses.
    prefill_tiles, decode_tiles = named if heads.head_dim <= _MAX_TRIED_HEAD_DIM else ((None,), (None,))
    run = partial(
        _agreed_seconds, heads=heads, device=device, block_size=block_size, has_lse=has_lse,
        seconds_of=seconds_of or cuda_seconds, agree=agree,
    )  # fmt: skip
    found: list[tuple[float, AttentionCandidate]] = []
    plain_kv = heads.kv_dtype == heads.dtype
    is_open = name == "auto" and tiles == "auto" and plain_kv and not only_triton and score_cap is None
    if name == _FLASH or is_open and _has_flash(device, agree):
        flash = AttentionCandidate(_FLASH, partial(attention_backend, _FLASH, device, heads.group))
        found.append((run(flash, trials[0]) + run(flash, trials[1]), flash))
    if name != _FLASH:
        def of_tiles(prefill: Any, decode: Any) -> AttentionCandidate:
            tiled = partial(TritonAttention, device, group=heads.group, prefill_tile=prefill, decode_tile=decode)
            make = partial(_capped, tiled, score_cap)
            return AttentionCandidate(f"{_TRITON} {prefill.name},{decode.name}" if prefill else _TRITON, make)

        chunk_s, prefill_tile = min(
            ((run(of_tiles(tile, decode_tiles[0]), trials[0]), tile) for tile in prefill_tiles), key=_seconds
        )
        decode_s, decode_tile = min(
            ((run(of_tiles(prefill_tile, tile), trials[1]), tile) for tile in decode_tiles), key=_seconds
        )
        found.append((chunk_s + decode_s, of_tiles(prefill_tile, decode_tile)))
    seconds, best = min(found, key=_seconds)
    if seconds == inf:
        if name != "auto" or not plain_kv or only_triton or score_cap is not None:
            raise ConfigError(
                f"model.attention_backend={name}: no kernel of it works on this GPU, see the log; "
                f"use attention_backend={_LAST}, which needs model.kv_dtype=auto"
            )
        log.warning("attention_backend_unavailable name=%s use=%s", best.label, _LAST)
        return partial(attention_backend, _LAST, device, heads.group)
    backend, _, pin = best.label.partition(" ")
    log.info(
        "attention_chosen name=%s pin=model.attention_backend=%s%s",
        best.label, backend, f" model.attention_tiles={pin}" if pin else "",
    )  # fmt: skip
    return best.make


def cuda_seconds(work: Callable[[], object]) -> float:
    """Seconds of the GPU, the best of a few runs."""
    work()
    seconds = inf
    for _ in range(_NUM_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds = min(seconds, begin.elapsed_time(end) / 1e3)
    return seconds


def _capped(make: MakeBackend, score_cap: float | None) -> AttentionBackend:
    backend = make()
    backend.score_cap = score_cap
    return backend


def _seconds(found: tuple[float, Any]) -> float:
    return found[0]


def _has_flash(device: torch.device, agree: Agree) -> bool:
    """Whether every rank has the package, and kernels for its GPU."""
    is_there = _FLASH in backend_names(device)
    if is_there:
        try:
            attention_backend(_FLASH, device)
        except ValueError as error:
            log.info("attention_trial name=%s skipped=%s", _FLASH, error)
            is_there = False
    return bool(agree(int(is_there)))


def _agreed_seconds(
    candidate: AttentionCandidate,
    trial: Trial,
    *,
    heads: AttentionHeads,
    device: torch.device,
    block_size: int | None,
    has_lse: bool,
    seconds_of: Seconds,
    agree: Agree,
) -> float:
    """Of the slowest rank; infinite where a rank finds the candidate wrong, or cannot run it. Collective."""
    seconds = inf
    try:
        error = _largest_error(candidate.make(), heads, device, block_size)
        tolerance = _TOLERANCE if heads.kv_dtype == heads.dtype else _TOLERANCE_FP8
        if not error <= tolerance:  # NaN, too
            raise ArithmeticError(f"outputs are off by {error:.3g}")
        work = _work(candidate.make(), trial, heads, device, block_size, has_lse)
        seconds = seconds_of(work)
        log.info(
            "attention_trial name=%s rows=%d context=%d ms=%.3f",
            candidate.label, trial.num_rows, trial.context, seconds * 1e3,
        )  # fmt: skip
    except Exception as error:  # torch, Triton and the package raise types of their own
        log.warning("attention_trial_failed name=%s reason=%s: %s", candidate.label, type(error).__name__, error)
    nanoseconds = -agree(-(int(seconds * 1e9) if seconds < inf else _NEVER_NS))
    return nanoseconds / 1e9 if nanoseconds < _NEVER_NS else inf


def _tables(block_size: int, lengths: Sequence[int]) -> tuple[list[SlotTable], int]:
    """Tables of sequences with blocks one after another, and the blocks in all."""
    tables, first_block = [], 0
    for length in lengths:
        table, count = SlotTable(block_size), num_blocks_for(length, block_size)
        table.append([(first_block, count)])
        tables.append(table)
        first_block += count
    return tables, first_block


def _random(heads: AttentionHeads, device: torch.device, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, heads.head_dim, dtype=torch.float32, device=device, generator=generator).to(heads.dtype)


def _largest_error(
    backend: AttentionBackend, heads: AttentionHeads, device: torch.device, block_size: int | None
) -> float:
    """Of a chunk beside a decode, against plain attention in fp64."""
    backend.score_cap = None  # plain attention has none
    block_size = block_size or backend.block_size
    past, rows_now, other = _CHECKED
    first, last = past + other, past + other + rows_now + 1
    (chunked, decoded), num_blocks = _tables(block_size, (past + rows_now, other + 1))
    layer = backend.allocate(num_blocks, block_size, heads.num_kv_heads, heads.head_dim, heads.kv_dtype)
    scale = heads.head_dim**-0.5
    kv_heads = heads.num_kv_heads
    queries = _random(heads, device, last, kv_heads, heads.group, seed=1)
    keys, values = (_random(heads, device, last, kv_heads, seed=seed) for seed in (2, 3))
    before = [QueryRange(0, past, 0, chunked), QueryRange(past, other, 0, decoded)]
    now = [QueryRange(0, rows_now, past, chunked), QueryRange(rows_now, 1, other, decoded)]
    seen = [*range(past), *range(first, last - 1)], [*range(past, first), last - 1]
    for ranges, rows in ((before, slice(first)), (now, slice(first, last))):
        out_THD = backend.attend(backend.plan(ranges), queries[rows], keys[rows], values[rows], layer, scale)
    error = 0.0
    for (first_row, num_rows, *_), index in zip(now, seen, strict=True):
        rows = slice(first_row, first_row + num_rows)
        expected, _ = reference.attention(
            queries[first:][rows].flatten(1, 2), keys[index], values[index], scale, is_causal=True
        )
        error = max(error, float((out_THD[rows].double() - expected).abs().max().nan_to_num(inf)))
    return error


def _work(
    backend: AttentionBackend,
    trial: Trial,
    heads: AttentionHeads,
    device: torch.device,
    block_size: int | None,
    has_lse: bool,
) -> Callable[[], object]:
    """One layer of the trial's batch. Everything a step needs of kernels is compiled here."""
    block_size = block_size or backend.block_size
    tables, num_blocks = _tables(block_size, [trial.context] * trial.num_sequences)
    layer = backend.allocate(num_blocks, block_size, heads.num_kv_heads, heads.head_dim, heads.kv_dtype)
    for tensor in layer:
        if tensor.dim() == 2:
            tensor.fill_(1.0)  # scales
        else:
            tensor.copy_(torch.randn(tensor.shape[1:], device=device).to(tensor.dtype).expand(tensor.shape))
    start, rows = trial.context - trial.num_rows, trial.num_rows
    plan = backend.plan([QueryRange(index * rows, rows, start, table) for index, table in enumerate(tables)])
    num_tokens, scale = trial.num_sequences * rows, heads.head_dim**-0.5
    q = _random(heads, device, num_tokens, heads.num_kv_heads, heads.group, seed=1)
    k, v = (_random(heads, device, num_tokens, heads.num_kv_heads, seed=seed) for seed in (2, 3))
    # Few rows over many keys, which are cut for all multiprocessors: the kernels that merge parts are compiled.
    few = min(rows, _FEW_ROWS)
    cut_plan = backend.plan([QueryRange(0, few, start, tables[0])])
    for compute in (backend.attend, backend.attend_with_lse) if has_lse else (backend.attend,):
        compute(cut_plan, q[:few], k[:few], v[:few], layer, scale)
        compute(plan, q, k, v, layer, scale)
        if rows > 1 and heads.kv_dtype != heads.dtype:  # a chunk so long that what is before it is widened
            rows_now = min(_LONG_ROWS, trial.context)
            long_q = _random(heads, device, rows_now, heads.num_kv_heads, heads.group, seed=1)
            new = _random(heads, device, rows_now, heads.num_kv_heads, seed=2)
            long_plan = backend.plan([QueryRange(0, rows_now, trial.context - rows_now, tables[0])])
            compute(long_plan, long_q, new, new, layer, scale)
    return lambda: backend.attend(plan, q, k, v, layer, scale)
