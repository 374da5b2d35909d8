"""What a rank runs on and in: its device, its dtypes, the memory for its KV, and how it says so."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.choose_backend import backend_names
from megatron_medha.kernels.native_build import (
    NativeUnavailable,
    missed_targets,
    native_library,
    native_target,
    usable_targets,
    use_target,
)

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def free_device_bytes(device: torch.device) -> int:
    """What is free on the GPU now that the weights are there. Raises ConfigError on a CPU."""
    if device.type != "cuda":
        raise ConfigError("kv_memory_bytes=None: only a GPU's memory is shared out by the rank; give a number")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes)


def kv_dtype_of(name: str, dtype: torch.dtype, backend: AttentionBackend) -> torch.dtype:
    """What KV is stored in; "auto" is the model's dtype. Raises ConfigError."""
    if name == "auto":
        return dtype
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


def device_of(name: str) -> torch.device:
    """The device to run on; "auto" is CUDA where it is usable and has an attention backend. Raises ConfigError."""
    if name == "auto":
        is_usable = torch.cuda.is_available() and backend_names(torch.device("cuda"))
        return device_of("cuda" if is_usable else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but there is no usable CUDA device; use device=cpu")
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
    # A GPU has no kernel for fp32 KV (kernels/kv/paged_kv.py), and nobody wants fp32 there unasked. fp16 matmuls are
    # thousands of times slower than bf16 ones on CPU (measured), and overflow where bf16 does not.
    if device.type == "cuda" and name == "float32":
        raise ConfigError("model.dtype=float32: no kernels for it on a GPU; use auto, bfloat16 or model.device=cpu")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else _DTYPES.get(checkpoint_dtype, torch.bfloat16)
    return _DTYPES[name]


def use_instructions(name: str, device: torch.device) -> None:
    """Settle the instruction set of this process's CPU kernels, and log it. Raises ConfigError."""
    if device.type != "cpu":
        return
    try:
        use_target(name)
        native_library()  # a pinned one is waited for, or refused
        log.info("cpu_instructions used=%s usable=%s", native_target().lower(), ",".join(usable_targets()).lower())
    except NativeUnavailable as error:
        if name != "auto":
            raise ConfigError(f"model.instruction_set={name}: cannot be had here: {error}; use auto") from error
        log.warning("cpu_instructions used=none reason=%s", error)


def described(
    device: torch.device,
    num_threads: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    options: ModelOptions,
    backend_name: str,
    linear_kernels: str = "",
    partition_tokens: int | None = None,
    own_bits_of_kvp: int | None = None,
    tiles: str = "",
) -> str:
    """For the line the API server prints when the model is ready, and /version: what decides the bits is in it.

    partition_tokens: of native attention. own_bits_of_kvp: ranks that share a request's KV, if bits depend on them.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {num_threads} threads"
    instructions = ""
    if backend_name == "native":
        instead = " and ".join(missed_targets()).lower()
        instructions = f" {native_target().lower()}" + (f" (instead of {instead})" if instead else "")
    kernels = f" in partitions of {partition_tokens}" if partition_tokens else ""
    kernels += f" (tiles {tiles})" if tiles else ""
    parts = [name, str(dtype).removeprefix("torch."), f"{backend_name}{instructions} attention{kernels}"]
    parts += [f"kvp={own_bits_of_kvp} with bits of its own"] if own_bits_of_kvp else []
    parts += [f"{linear_kernels} linear layers"] if linear_kernels else []
    parts += [f"KV in {str(kv_dtype).removeprefix('torch.')}"] if kv_dtype != dtype else []
    parts += [f"FP8 linear layers ({options.fp8})"] if options.fp8 != "none" else []
    parts += [f"{options.weight_dtype} weights"] if options.weight_dtype != "auto" else []
    parts += [f"virtual tp {options.virtual_tp}"] if options.virtual_tp != "1" else []
    return ", ".join(parts)
