"""The part of the GPU check that comes first: does each thing a server does work at all, on a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from experiments.gpu.measure import Check, Row
from experiments.gpu.model_parts import SMALL, TINY, OneRank
from megatron_medha.core.batch import Chunk
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.core.sampling import Sampling
from megatron_medha.kernels.kv.paged_kv import E4M3
from megatron_medha.model.draw import SamplingRow
from megatron_medha.model.rotary import Rotary
from megatron_medha.model.sampler import Sampler
from megatron_medha.parallel.groups import build_groups
from megatron_medha.worker.cuda_graphs import GraphShape, step_graphs


def smoke(check: Check) -> None:
    """Logits by every way there is to compute a step; tokens by every way to choose them."""
    reference = cache(partial(_logits, check, torch.device("cpu"), torch.float32))
    bf16 = partial(_logits, check, check.device, torch.bfloat16)
    check.case("eager steps", 60, partial(_against, check, reference, bf16, "eager steps", 0.03))
    check.case("steps by graphs", 60, partial(
        _against, check, reference, partial(bf16, has_graphs=True), "steps by graphs", 0.03
    ))  # fmt: skip
    check.case("a step launched ahead", 60, partial(_ahead, check))
    check.case("draws from a nucleus", 30, partial(_nucleus, check))
    if check.is_cuda:
        e4m3 = partial(bf16, kv_dtype=E4M3)
        check.case("e4m3 KV", 60, partial(_against, check, reference, e4m3, "e4m3 KV", None))


def _config(check: Check) -> Any:
    return TINY if check.is_tiny else SMALL


def _world(check: Check, device: torch.device, dtype: torch.dtype, *, has_graphs: bool = False, **how: Any) -> OneRank:
    backend = "triton" if has_graphs else None
    world = OneRank(
        check, _config(check), 1024, dtype=dtype, device=device, are_weights_portable=True, backend=backend, **how
    )
    if has_graphs:
        rank = world.rank
        shapes = [GraphShape(1, 1, False), GraphShape(16, 4, True) if check.is_tiny else GraphShape(64, 32, True)]
        # On a CPU nothing can be captured: the work is done again by hand, over the same buffers.
        by_hand = None if check.is_cuda else (lambda tp: lambda: _replayed_by_hand)
        rank.graphs = step_graphs(
            rank.model, rank._backend, rank._kv_layers, Rotary(world.config), device, build_groups(ParallelLayout()),
            new_capture=by_hand, shapes=shapes,
        )  # fmt: skip
        assert rank.graphs is not None, "no graphs; the log says why"
    return world


def _replayed_by_hand(work: Callable[[], Any], is_run_before: bool) -> Any:
    output = work()
    return lambda: output.copy_(work()), output


def _logits(check: Check, device: torch.device, dtype: torch.dtype, **how: Any) -> torch.Tensor:
    """After a prompt in two chunks and a single token, [V]."""
    world = _world(check, device, dtype, **how)
    rank, count = world.rank, 14 if check.is_tiny else 49
    found: list[torch.Tensor] = []
    choose = rank._choose

    def kept(logits_RV: torch.Tensor, *rest: Any) -> Any:
        found.append(logits_RV[-1:].float().cpu())
        return choose(logits_RV, *rest)

    rank._choose = kept  # type: ignore[method-assign]
    rank._launch_ahead = lambda work, underway: None  # type: ignore[method-assign]
    world.begin("a", 2 * count + 2)
    world.step(Chunk("a", 1, count, False))
    world.step(Chunk("a", 1 + count, count, False))
    found.clear()  # of steps that sample nothing there is nothing
    world.step(Chunk("a", 2 * count + 1, 1, True))
    (logits_1V,) = found
    return logits_1V[0]


def _against(
    check: Check,
    reference: Callable[[], torch.Tensor],
    of: Callable[[], torch.Tensor],
    name: str,
    bar: float | None,
) -> None:
    expected, found = reference(), of()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    check.add(Row(f"logits against the CPU's in fp32: {name}", error, "of max", bar, True))


def _tokens(check: Check, is_ahead: bool) -> list[int]:
    world = _world(check, check.device, torch.bfloat16, has_graphs=True)
    if not is_ahead:
        world.rank._launch_ahead = lambda work, underway: None  # type: ignore[method-assign]
    num_tokens = 15
    world.begin("a", num_tokens)
    tokens = [world.sampled(Chunk("a", 1, num_tokens - 1, True))]
    tokens += [world.sampled(Chunk("a", num_tokens + i, 1, True)) for i in range(4 if check.is_tiny else 12)]
    return tokens


def _ahead(check: Check) -> None:
    """Greedy tokens of steps launched before the host has seen the last ones, against those of steps that wait."""
    waiting, ahead = _tokens(check, False), _tokens(check, True)
    differing = sum(a != b for a, b in zip(waiting, ahead, strict=True))
    check.add(Row("tokens of steps launched ahead that differ", float(differing), "", 0.0, True, f" of {len(ahead)}"))


def _nucleus(check: Check) -> None:
    """Draws with top_p on the device lie within the nucleus that the CPU finds, and are its draws."""
    size = 512 if check.is_tiny else 128_256
    logits = torch.randn(16, size, generator=torch.Generator().manual_seed(check.seed)) * 3
    sampling = Sampling(max_output_tokens=8, temperature=1.0, top_p=0.9)
    rows = [
        SamplingRow(sampling=sampling, prompt_ids=None, output_ids=[], seed=seed, num_output_tokens=0)
        for seed in range(16)
    ]
    found = []
    for device in (check.device, torch.device("cpu")):
        chosen = Sampler(size, device).choose(logits.to(device), rows).rows()
        found.append([None if one is None else one.token_id for one in chosen])
    differing = sum(a != b for a, b in zip(*found, strict=True))
    # Sums in another order move a border by some 1e-6 of the mass.
    check.add(Row("draws from a nucleus that are not the CPU's", float(differing), "", 1.0, True, " of 16"))
