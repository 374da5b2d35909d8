"""Brings a rank up: threads, groups, model, weights, KV memory, warm-up. What it runs in: device.py."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.cluster.kv_audit import SentBlocks
from megatron_medha.cluster.messages import NewRequest, RankReady, RankStep
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.cost.step_sizes import GRAPH_SIZES, NO_STEP_SIZES
from megatron_medha.core.errors import CheckpointError, ConfigError
from megatron_medha.core.kv.block_pool import Extent, num_blocks_for
from megatron_medha.core.kv.ops import append_op
from megatron_medha.core.kv.shards import check_shard_tokens, default_shard_tokens
from megatron_medha.core.sampling import Sampling
from megatron_medha.kernels.attention.backend import AttentionBackend, LayerKV
from megatron_medha.kernels.choose_backend import attention_backend
from megatron_medha.kernels.linear.native_decoder import NativeDecoder
from megatron_medha.kernels.linear.native_linear import INT4_GROUP
from megatron_medha.kernels.native_build import BUILD_S, is_built
from megatron_medha.model.build import (
    build_model,
    check_layout_of,
    give_up_transformer_engine,
    transformer_engine_works,
)
from megatron_medha.model.cpu_model import use_cpu_kernels
from megatron_medha.model.fp8 import check_fp8, quantise_linears, why_fp8_fails
from megatron_medha.model.grouped_experts import group_experts
from megatron_medha.model.latent_attention import absorb_projections
from megatron_medha.model.narrow_weights import check_weight_dtype
from megatron_medha.model.packed_linear import linear_kernels_of
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.model_config import ModelConfig
from megatron_medha.models.tokenizer_facts import with_end_tokens_of
from megatron_medha.models.virtual_tp import virtual_tp_of
from megatron_medha.parallel.groups import MedhaPGs, build_groups, init_distributed, min_over_ranks
from megatron_medha.parallel.point_board import PointBoard
from megatron_medha.parallel.tp_all_reduce import tp_all_reduce
from megatron_medha.worker.cuda_graphs import LARGEST_GRAPH_TOKENS, step_graphs
from megatron_medha.worker.grammar_masks import GrammarMasks
from megatron_medha.worker.hold_points import HoldPoints
from megatron_medha.worker.kv_cache import allocate_kv, num_blocks_that_fit
from megatron_medha.worker.rank import Rank
from megatron_medha.worker.startup.attention_trials import (
    AttentionHeads,
    MakeBackend,
    has_trials,
    tried_attention,
)
from megatron_medha.worker.startup.batch_invariance import make_batch_invariant
from megatron_medha.worker.startup.cpu_share import num_threads_of_rank
from megatron_medha.worker.startup.device import (
    context_len_of,
    described,
    device_of,
    dtype_of,
    free_device_bytes,
    kv_dtype_of,
    use_instructions,
)
from megatron_medha.worker.startup.memory_peaks import (
    GPU_KV_SHARE,
    CudaMemory,
    StepPeaks,
    kv_bytes_beside,
    measured_peaks,
)

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 64
_MEASURED_DRAWS = 256  # scheduler.max_num_sequences by default
_PROGRESS_INTERVAL_S = 0.1
_M_TRIM_THRESHOLD = -1  # from malloc.h
_M_MMAP_THRESHOLD = -3

Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0..1


def load_rank(config: RankConfig, progress: Progress) -> tuple[Rank, RankReady]:
    """A rank that has computed its first tokens, and what it sends to the API server."""
    num_threads = num_threads_of_rank(config.model.num_threads, config.layout.world_size)
    torch.set_num_threads(num_threads)
    tune_malloc()
    device = device_of(config.model.device)
    options = dataclasses.replace(config.model, device=device.type)  # checks them for this device
    directory, layout = Path(config.checkpoint), config.layout
    model_config = with_end_tokens_of(read_model_config(directory), config.tokenizer)
    dtype = dtype_of(options.dtype, model_config.dtype, device)
    max_context_len = context_len_of(options.max_context_len, model_config.max_context_len)
    if device.type == "cpu" and not is_built():
        progress(f"building the CPU kernels, once for this machine, about {BUILD_S} s", 0.0)
    use_instructions(options.instruction_set, device)
    new_backend: MakeBackend = partial(
        attention_backend,
        options.attention_backend,
        device,
        group=model_config.queries_per_cached_head(layout.tp),
        score_cap=model_config.score_cap,
    )
    try:
        backend = new_backend()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if model_config.window is not None and not (backend.reads_by_slots or backend.masks_windows):
        raise ConfigError(f"attention_backend={backend.name}: has no layers with a window; native, aten, triton have")
    block_size = options.block_size or backend.block_size
    check_shard_tokens(config.max_tokens_per_shard, config.kv, block_size)
    kv_dtype = kv_dtype_of(options.kv_dtype, dtype, backend)
    check_fp8(options.fp8, dtype=dtype, has_transformer_engine=transformer_engine_works(device), tp=layout.tp)
    check_weight_dtype(options.weight_dtype, dtype=dtype)
    check_layout_of(model_config, tp=layout.tp, spp=layout.spp)
    step = INT4_GROUP if options.weight_dtype == "int4" else 1  # a scale's inputs are of one slice
    virtual_tp = virtual_tp_of(options.virtual_tp, model_config, tp=layout.tp, step=step)
    options = dataclasses.replace(options, virtual_tp=str(virtual_tp))
    if layout.world_size > 1:
        progress("the other ranks", 0.0)
    init_distributed(layout, config.rank, device=device, init_method=config.init_method)
    pgs = build_groups(layout)
    # What is batch-invariant is not chosen by timing.
    if has_trials(backend, device) and not (options.batch_invariant and options.attention_tiles == "auto"):
        progress("attention kernels are compiled and tried", 0.0)
        new_backend = tried_attention(
            options.attention_backend,
            options.attention_tiles,
            AttentionHeads(
                model_config.num_cached_heads(layout.tp), model_config.queries_per_cached_head(layout.tp),
                model_config.cached_head_dim, dtype, kv_dtype,
            ),
            device,
            block_size=options.block_size,
            has_lse=layout.kvp > 1,
            score_cap=model_config.score_cap,
            only_triton=model_config.window is not None or model_config.latent is not None,
        )  # fmt: skip
        backend = new_backend()
    backend.partition_tokens = config.kv.partition_tokens
    if options.batch_invariant and device.type == "cuda":
        make_batch_invariant(backend)
    guided = GrammarMasks(
        Path(config.tokenizer or config.checkpoint),
        model_config.vocab_size,
        model_config.stop_token_ids,
    )
    if pgs.tp.rank() == 0 and pgs.pp.rank() == pgs.pp.size() - 1:  # it samples
        progress("vocabulary", 0.0)
        guided.load()
    model, decoder = _loaded_model(model_config, directory, options, dtype, backend, device, pgs, progress)
    kv_bytes = config.kv_memory_bytes
    if kv_bytes is None:
        progress("memory of the largest step", 0.0)
        peaks = _step_peaks(config, model, model_config, block_size, kv_dtype, device, pgs, new_backend)
        gc.collect()  # modules hold one another in cycles
        torch.cuda.empty_cache()
        kv_bytes = kv_bytes_beside(CudaMemory(device), peaks, options.kv_memory_share or GPU_KV_SHARE)
    kv_layers, num_blocks = _kv_memory(config, model, model_config, backend, block_size, kv_dtype, kv_bytes)
    shard_tokens = config.max_tokens_per_shard
    if shard_tokens is None and layout.kvp > 1:
        shard_tokens = default_shard_tokens(num_blocks, block_size, max_context_len, layout.kvp, config.kv)
    points = HoldPoints(config.rank, layout, PointBoard.open(device))
    points.can_hold &= device.type == "cpu"
    rank = Rank(
        rank=config.rank,
        model=model,
        config=model_config,
        backend=backend,
        kv_layers=kv_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        shard_tokens=shard_tokens or num_blocks * block_size,
        device=device,
        pgs=pgs,
        decoder=decoder,
        guided=guided,
        points=points if points.can_hold else None,
    )
    if rank.shards.has_own_bits:
        log.warning(
            "bits_differ_from_one_rank kvp=%d attention=%s shard_tokens=%d partition_tokens=%d",
            layout.kvp, backend.name, rank.shards.shard_tokens, backend.partition_tokens,
        )  # fmt: skip
    progress("warm-up", 0.0)
    warm_up(rank, max_tokens=min(num_blocks * block_size, model_config.max_context_len), block_size=block_size)
    if config.is_audited:
        rank.sent_blocks = SentBlocks(rank.kvp_rank)
    if device.type == "cuda" and options.cuda_graphs:
        progress("CUDA graphs", 0.0)
        rotary = Rotary(model_config)
        rank.graphs = step_graphs(model, backend, kv_layers, rotary, device, pgs, window=model_config.window)
    shape = model_config.shape(dtype.itemsize, kv_dtype.itemsize if kv_dtype != dtype else None)
    ready = RankReady(
        rank=config.rank,
        # Only the report is narrowed: the model's own length may enter its rotary frequencies.
        shape=dataclasses.replace(shape, max_context_len=max_context_len),
        num_blocks=num_blocks,
        block_size=block_size,
        stop_token_ids=model_config.stop_token_ids,
        device=described(
            device, num_threads, dtype, kv_dtype, options, backend.name, linear_kernels_of(model),
            backend.partition_tokens if backend.is_native else None, layout.kvp if rank.shards.has_own_bits else None,
            backend.tiles,
        ),  # fmt: skip
        shard_tokens=shard_tokens,
        can_hold=points.can_hold,
        step_sizes=GRAPH_SIZES if rank.graphs is not None else NO_STEP_SIZES,
        can_run_ahead=device.type == "cuda" and layout.spp > 1 and layout.kvp == 1,
    )
    return rank, ready


def _loaded_model(
    config: ModelConfig,
    directory: Path,
    options: ModelOptions,
    dtype: torch.dtype,
    backend: AttentionBackend,
    device: torch.device,
    pgs: MedhaPGs,
    progress: Progress,
) -> tuple[GPTModel, NativeDecoder | None]:
    """This rank's part of the model with its weights, in the layout that its kernels read; see use_cpu_kernels."""
    progress("model", 0.0)
    model = _quantised_model(config, directory, options, dtype, device, pgs, progress)
    if (
        options.fp8 != "none"
        and transformer_engine_works(device)
        and (reason := why_fp8_fails(model)) is not None
    ):
        give_up_transformer_engine(reason)
        check_fp8(options.fp8, dtype=dtype, has_transformer_engine=False, tp=pgs.tp.size())
        del model
        model = _quantised_model(config, directory, options, dtype, device, pgs, progress)
    decoder = use_cpu_kernels(
        model,
        backend,
        tp_all_reduce(pgs.tp, device),
        weight_dtype=options.weight_dtype,
        linear_backend=options.linear_backend,
        virtual_tp=int(options.virtual_tp),
    )
    return model, decoder


def _quantised_model(
    config: ModelConfig,
    directory: Path,
    options: ModelOptions,
    dtype: torch.dtype,
    device: torch.device,
    pgs: MedhaPGs,
    progress: Progress,
) -> GPTModel:
    model = build_model(config, dtype=dtype, device=device, pgs=pgs, is_initialized=False, fp8=options.fp8)
    load_weights(model, config, directory, _throttled(progress))
    absorb_projections(model)
    model.requires_grad_(False)
    quantise_linears(model, options.fp8, transformer_engine_works(device))
    if device.type == "cuda":
        group_experts(model)
    return model


def _kv_memory(
    config: RankConfig,
    model: GPTModel,
    model_config: ModelConfig,
    backend: AttentionBackend,
    block_size: int,
    dtype: torch.dtype,
    num_bytes: int,
    max_blocks: int | None = None,
) -> tuple[tuple[LayerKV, ...], int]:
    """KV of every layer, in as many blocks as every rank has memory for."""
    sizes: dict[str, Any] = {
        "block_size": block_size,
        "num_layers": len(model.decoder.layers),
        "num_kv_heads": model_config.num_cached_heads(config.layout.tp),
        "head_dim": model_config.cached_head_dim,
        "are_values_keys": model_config.latent is not None and backend.stores_latents_once,
    }
    num_blocks = min_over_ranks(min(num_blocks_that_fit(num_bytes, dtype=dtype, **sizes), max_blocks or 1 << 62))
    return allocate_kv(backend, num_blocks, dtype=dtype, **sizes), num_blocks


def _step_peaks(
    config: RankConfig,
    model: GPTModel,
    model_config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    pgs: MedhaPGs,
    new_backend: MakeBackend,
) -> StepPeaks:
    """What the largest steps need, over a small pool that is given up again; see kv_memory.py. Raises ConfigError."""
    free_bytes = free_device_bytes(device)
    backend = new_backend()  # of its own, as one holds tables for the pool that it has allocated
    largest = min(config.max_batch_tokens, model_config.max_context_len - 1)
    wanted_blocks = num_blocks_for(largest + 1, block_size)
    kv_layers, num_blocks = _kv_memory(
        config, model, model_config, backend, block_size, dtype, free_bytes // 2, wanted_blocks
    )
    rank = Rank(
        rank=config.rank, model=model, config=model_config, backend=backend, kv_layers=kv_layers,
        num_blocks=num_blocks, block_size=block_size, shard_tokens=num_blocks * block_size, device=device, pgs=pgs,
    )  # fmt: skip
    has_graphs = config.model.cuda_graphs and backend.has_padded_plans
    largest = min(largest, num_blocks * block_size - 1)
    return measured_peaks(
        CudaMemory(device),
        lambda num_tokens: compute_step(rank, num_tokens, block_size),
        largest_tokens=largest,
        graph_tokens=min(largest, LARGEST_GRAPH_TOKENS) if has_graphs else 0,
    )


def compute_step(rank: Rank, num_tokens: int, block_size: int) -> None:
    """A step of so many tokens on blocks nobody owns yet: a chunk, beside as many drawn tokens as there may be.

    All single tokens lie in the same block, as nobody reads what comes out.
    """
    num_single = min(_MEASURED_DRAWS, num_tokens - 1)
    lengths = {"measured-chunk": num_tokens - num_single} | {f"measured-{i}": 1 for i in range(num_single)}
    sampling = Sampling(max_output_tokens=2, temperature=1.0, top_p=0.9)
    ranks = (rank.kvp_rank,)
    new = [NewRequest(name, array("i", [0] * length).tobytes(), length, sampling) for name, length in lengths.items()]
    begin = [
        append_op(name, rank.kvp_rank, (Extent(0, num_blocks_for(length, block_size)),))
        for name, length in lengths.items()
    ]
    chunks = tuple(Chunk(name, 0, length, True, ranks) for name, length in lengths.items())
    rank.run(RankStep(-2, chunks, tuple(new), kv_ops=tuple(begin)))
    rank.run(RankStep(-1, (), (), tuple(lengths)))


def warm_up(rank: Rank, *, max_tokens: int, block_size: int) -> None:
    """One prefill chunk and one decode on blocks nobody owns yet; first calls are slow (threads, code paths).

    max_tokens: that there are KV and positions for.
    """
    num_tokens = min(_WARM_UP_TOKENS, max_tokens - 1, rank.shards.shard_tokens - 1)  # all in one shard
    request_id = "warm-up"
    new = NewRequest(
        request_id=request_id,
        token_ids=array("i", [0] * num_tokens).tobytes(),
        num_prompt_tokens=num_tokens,
        sampling=Sampling(max_output_tokens=2, temperature=0.0),
    )
    extent = Extent(0, num_blocks_for(num_tokens + 1, block_size))
    # Of this kvp rank alone: its pipeline and tensor-parallel partners run the same.
    ranks = (rank.kvp_rank,)
    begin = append_op(request_id, rank.kvp_rank, (extent,))
    done = rank.run(RankStep(-2, (Chunk(request_id, 0, num_tokens, True, ranks),), (new,), kv_ops=(begin,)))
    if done.failed:
        raise CheckpointError(
            f"the model computes no numbers from its first tokens: {done.failed[0][1]}. Its weights are finite but too "
            "large for the dtype, or the architecture is not the one they were trained with"
        )
    sampled = () if rank.samples_for_itself else ((request_id, 0),)
    rank.run(RankStep(-1, (Chunk(request_id, num_tokens, 1, True, ranks),), sampled=sampled))
    rank.run(RankStep(0, (), (), (request_id,)))


def tune_malloc() -> None:
    """Let glibc keep what is freed instead of returning it to the system and taking it back, page by page.

    A step allocates the same large temporaries as the one before. For 512 tokens of a small model, RMSNorm took
    0.84 ms instead of 0.10, the gated MLP's activation 4.5 instead of 0.9 (2 busy cores). Elsewhere a no-op.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _throttled(progress: Progress) -> Progress:
    """`progress`, at most once per interval: loading may report every tensor, and each report is a message."""
    last_s = -_PROGRESS_INTERVAL_S

    def report(what: str, fraction: float) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _PROGRESS_INTERVAL_S:
            last_s = now_s
            progress(what, fraction)

    return report
