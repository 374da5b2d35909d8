"""Brings a rank up: threads, groups, model, weights, KV memory, warm-up."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_medha.checkpoints.detect import load_weights, read_model_config
from megatron_medha.cluster.kv_audit import SentBlocks
from megatron_medha.cluster.messages import NewRequest, Ready, Step
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.batch import Chunk
from megatron_medha.core.cost.capacity import check_divides
from megatron_medha.core.errors import CheckpointError, ConfigError
from megatron_medha.core.kv.block_pool import Extent, num_blocks_for
from megatron_medha.core.kv.kv_memory import default_shard_tokens
from megatron_medha.core.sampling import Sampling
from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.choose_backend import attention_backend, backend_names
from megatron_medha.model.build import build_model, transformer_engine_works
from megatron_medha.model.fp8 import check_fp8, quantise_linears
from megatron_medha.model.int8_weights import check_weight_dtype
from megatron_medha.model.native_decoder_model import use_native_decoder
from megatron_medha.model.native_passes import use_native_passes
from megatron_medha.model.packed_linear import pack_linears
from megatron_medha.model.rotary import Rotary
from megatron_medha.models.tokenizer_facts import with_end_tokens_of
from megatron_medha.parallel.groups import build_groups, init_distributed, least_of_all_ranks
from megatron_medha.parallel.tp_all_reduce import tp_sum
from megatron_medha.worker.cuda_graphs import step_graphs
from megatron_medha.worker.grammar_masks import GuidedSampling
from megatron_medha.worker.kv_cache import allocate_kv, num_kv_blocks
from megatron_medha.worker.rank import Rank
from megatron_medha.worker.startup.cpu_share import num_threads_of_rank

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WARM_UP_TOKENS = 64
_PROGRESS_INTERVAL_S = 0.1
_M_TRIM_THRESHOLD = -1  # from malloc.h
_M_MMAP_THRESHOLD = -3

Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0..1


def load_rank(config: RankConfig, progress: Progress) -> tuple[Rank, Ready]:
    """A rank that has computed its first tokens, and what the front is told about it."""
    num_threads = num_threads_of_rank(config.num_threads, config.layout.world_size)
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    device = device_of(config.device)
    directory = Path(config.checkpoint)
    model_config = with_end_tokens_of(read_model_config(directory), config.tokenizer)
    dtype = dtype_of(config.dtype, model_config.dtype, device)
    max_context_len = context_len_of(config.max_context_len, model_config.max_context_len)
    try:
        backend = attention_backend(
            config.attention_backend, device, group=model_config.num_heads // model_config.num_kv_heads
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error

    block_size = config.block_size or backend.block_size
    kv_dtype = kv_dtype_of(config.kv_dtype, dtype, backend)
    has_transformer_engine = transformer_engine_works(device)
    check_fp8(config.fp8, dtype=dtype, has_transformer_engine=has_transformer_engine, tp=config.layout.tp)
    check_weight_dtype(config.weight_dtype, dtype=dtype, device=device, fp8=config.fp8)
    check_divides(model_config, tp=config.layout.tp, spp=config.layout.spp)
    if config.layout.world_size > 1:
        progress("the other ranks", 0.0)
    init_distributed(config.layout, config.rank, device=device, init_method=config.init_method)
    pgs = build_groups(config.layout)
    guided = GuidedSampling(
        Path(config.tokenizer or config.checkpoint) / "tokenizer.json",
        model_config.vocab_size,
        model_config.stop_token_ids,
    )
    if pgs.tp.rank() == 0 and pgs.pp.rank() == pgs.pp.size() - 1:  # it samples
        progress("vocabulary", 0.0)
        guided.load()
    progress("model", 0.0)
    model = build_model(model_config, dtype=dtype, device=device, pgs=pgs, is_initialized=False, fp8=config.fp8)
    load_weights(model, model_config, directory, _rarely(progress))
    model.requires_grad_(False)
    quantise_linears(model, config.fp8, has_transformer_engine)
    pack_linears(model, tp_sum(pgs.tp, device), has_int8_weights=config.weight_dtype == "int8")
    use_native_passes(model)
    use_native_decoder(model)

    num_layers = len(model.decoder.layers)
    num_kv_heads = model_config.num_kv_heads // config.layout.tp
    num_blocks = num_kv_blocks(
        config.kv_memory_bytes or free_device_bytes(device, config.kv_memory_share),
        block_size=block_size,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=model_config.head_dim,
        dtype=kv_dtype,
    )
    num_blocks = least_of_all_ranks(num_blocks)
    kv_layers = allocate_kv(
        backend,
        num_blocks,
        block_size=block_size,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=model_config.head_dim,
        dtype=kv_dtype,
    )
    rank = Rank(
        rank=config.rank,
        model=model,
        config=model_config,
        backend=backend,
        kv_layers=kv_layers,
        block_size=block_size,
        shard_tokens=config.max_tokens_per_shard
        or default_shard_tokens(num_blocks, block_size, max_context_len, config.layout.kvp),
        device=device,
        pgs=pgs,
        guided=guided,
    )
    progress("warm-up", 0.0)
    warm_up(rank, num_blocks=num_blocks, block_size=block_size)
    if config.is_audited:
        rank.sent_blocks = SentBlocks(rank.kvp_rank, rank.shards.shard_tokens)
    if device.type == "cuda" and config.cuda_graphs:
        progress("CUDA graphs", 0.0)
        rank.graphs = step_graphs(model, backend, kv_layers, Rotary(model_config), device, pgs)
    ready = Ready(
        rank=config.rank,
        # Only the report is narrowed: the model's own length may enter its rotary frequencies.
        shape=dataclasses.replace(model_config.shape(dtype.itemsize), max_context_len=max_context_len),
        num_blocks=num_blocks,
        block_size=block_size,
        stop_token_ids=model_config.stop_token_ids,
        device=_described(device, num_threads, dtype, kv_dtype, config, backend.name),
    )
    return rank, ready


def warm_up(rank: Rank, *, num_blocks: int, block_size: int) -> None:
    """One prefill chunk and one decode on blocks nobody owns yet; first calls are slow (threads, code paths)."""
    num_tokens = min(_WARM_UP_TOKENS, num_blocks * block_size - 1)
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
    done = rank.run(Step(-2, (Chunk(request_id, 0, num_tokens, True, ranks, (extent,)),), (new,)))
    if done.failed:
        raise CheckpointError(
            f"the model computes no numbers from its first tokens: {done.failed[0][1]}. Its weights are finite but too "
            "large for the dtype, or the architecture is not the one they were trained with"
        )
    sampled = () if rank.samples_for_itself else ((request_id, 0),)
    rank.run(Step(-1, (Chunk(request_id, num_tokens, 1, True, ranks),), sampled=sampled))
    rank.run(Step(0, (), (), (request_id,)))


def free_device_bytes(device: torch.device, share: float) -> int:
    """That share of what is free on the GPU now that the weights are there. Raises ConfigError on a CPU."""
    if device.type != "cuda":
        raise ConfigError("kv_memory_bytes=None: only a GPU's memory is shared out by the rank; give a number")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes * share)


def kv_dtype_of(name: str, dtype: torch.dtype, backend: AttentionBackend) -> torch.dtype:
    """What KV is stored in; "auto" is the model's dtype. Raises ConfigError."""
    if name == "auto":
        return dtype
    if name != "fp8_e4m3":
        raise ConfigError(f"kv_dtype={name} is not one of auto, fp8_e4m3")
    if not backend.stores_fp8:
        raise ConfigError(f"kv_dtype=fp8_e4m3 needs attention_backend=triton, not {backend.name}; use kv_dtype=auto")
    return torch.float8_e4m3fn


def context_len_of(wanted: int | None, of_checkpoint: int) -> int:
    """The longest sequence to serve; the checkpoint's own length unless told otherwise. Raises ConfigError."""
    if wanted is None:
        return of_checkpoint
    if not 0 < wanted <= of_checkpoint:
        raise ConfigError(f"max_context_len={wanted} must lie between 1 and the checkpoint's own {of_checkpoint}")
    return wanted


def keep_freed_memory() -> None:
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


def device_of(name: str) -> torch.device:
    """The device to run on; "auto" is CUDA where it is usable and has an attention backend. Raises ConfigError."""
    if name == "auto":
        is_usable = torch.cuda.is_available() and backend_names(torch.device("cuda"))
        return device_of("cuda" if is_usable else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but there is no usable CUDA device; use device=cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name} is not one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_device_index(os.environ, torch.cuda.device_count()))
    torch.cuda.set_device(device)  # what says "cuda" alone, as Megatron does, means this one
    return device


def local_device_index(environment: Mapping[str, str], num_devices: int) -> int:
    """Which of this machine's GPUs is this rank's: as many as ranks here, in their order. Raises ConfigError."""
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), None)
    if name is None or num_devices == 1 and "CUDA_VISIBLE_DEVICES" in environment:
        return 0  # alone here, or the launcher has shown this rank its own device only
    index = int(environment[name])
    if index >= num_devices:
        raise ConfigError(
            f"{name}={index}: this machine shows {num_devices} CUDA devices, and every rank needs one of its own; "
            "take smaller parallel.* or more machines (launch=attach)"
        )
    return index


def dtype_of(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to run in; "auto" is the checkpoint's own, or bfloat16 where that is not run. Raises ConfigError."""
    if name not in ("auto", *_DTYPES):
        raise ConfigError(f"dtype={name} is not one of auto, {', '.join(_DTYPES)}")
    # A GPU has no kernel for fp32 KV (kernels/kv/paged_kv.py), and nobody wants fp32 there unasked. fp16 matmuls are
    # thousands of times slower than bf16 ones on CPU (measured), and overflow where bf16 does not.
    if device.type == "cuda" and name == "float32":
        raise ConfigError("model.dtype=float32: no kernels for it on a GPU; use auto, bfloat16 or model.device=cpu")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else _DTYPES.get(checkpoint_dtype, torch.bfloat16)
    return _DTYPES[name]


def _described(
    device: torch.device,
    num_threads: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    config: RankConfig,
    backend_name: str,
) -> str:
    """For the line the front prints when the model is ready."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {num_threads} threads"
    parts = [name, str(dtype).removeprefix("torch."), f"{backend_name} attention"]
    parts += [f"KV in {str(kv_dtype).removeprefix('torch.')}"] if kv_dtype != dtype else []
    parts += [f"FP8 linear layers ({config.fp8})"] if config.fp8 != "none" else []
    parts += ["int8 weights"] if config.weight_dtype == "int8" else []
    return ", ".join(parts)


def _rarely(progress: Progress) -> Progress:
    """`progress`, at most once per interval: loading may report every tensor, and each report is a message."""
    last_s = -_PROGRESS_INTERVAL_S

    def report(what: str, fraction: float) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _PROGRESS_INTERVAL_S:
            last_s = now_s
            progress(what, fraction)

    return report
