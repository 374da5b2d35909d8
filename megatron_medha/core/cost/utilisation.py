"""How much of the hardware a run has used: FLOPs and bytes that a model needs, and MFU and MBU from them. Causal."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_medha.core.cost.hardware import Hardware
from megatron_medha.core.model_shape import ModelShape


def matmul_flops(shape: ModelShape, num_tokens: int, num_sampled: int) -> int:
    """Of tokens through all layers, and of the rows sampled from through the head; the embedding is no product."""
    return 2 * (num_tokens * shape.num_layers * shape.num_active_layer_params + num_sampled * shape.num_head_params)


def attention_flops(shape: ModelShape, start: int, num_tokens: int) -> int:
    """Of a chunk after `start` tokens: scores and values, every query with the keys up to its own.

    Publications that count every query with all keys of its chunk, or of the prompt, state up to twice as much.
    """
    pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return 4 * shape.num_layers * shape.num_heads * shape.cached_dim * pairs


def batch_flops(shape: ModelShape, chunks: Iterable[tuple[int, int]], num_sampled: int) -> int:
    """Of one step with these (start, num_tokens) chunks; a decode is a chunk of one token."""
    num_tokens = flops = 0
    for start, count in chunks:
        num_tokens += count
        flops += attention_flops(shape, start, count)
    return flops + matmul_flops(shape, num_tokens, num_sampled)


def prefill_flops(shape: ModelShape, num_tokens: int) -> int:
    """Of a whole prompt, whatever its chunks, with its first output token."""
    return batch_flops(shape, [(0, num_tokens)], num_sampled=1)


def batch_bytes(shape: ModelShape, chunks: Iterable[tuple[int, int]], num_sampled: int, num_replicas: int = 1) -> float:
    """Weights read once by each of `num_replicas` (KVP ranks that work on the step), KV read and written, in one step.

    Of experts only those count that an even router would send at least one of the tokens to.
    """
    num_tokens = num_kv = 0
    for start, count in chunks:
        num_tokens += count
        num_kv += start + 2 * count  # read with its own keys, and those written
    head_params = shape.num_head_params if num_sampled else 0
    params = shape.num_layers * shape.num_touched_layer_params(num_tokens) + head_params
    return num_replicas * params * shape.bytes_per_element + num_kv * shape.kv_bytes_per_token


def mfu(flops: float, hardware: Hardware, num_devices: int, seconds: float, bytes_per_element: int = 2) -> float:
    """Model FLOPs per second over the data sheet's peak of all devices (in a type of bytes_per_element)."""
    return flops / (num_devices * hardware.matmul_flops_per_s(bytes_per_element) * seconds)


def mbu(num_bytes: float, hardware: Hardware, num_devices: int, seconds: float) -> float:
    """Bytes that had to move per second over the data sheet's bandwidth of all devices."""
    return num_bytes / (num_devices * hardware.memory_bytes_per_s * seconds)
