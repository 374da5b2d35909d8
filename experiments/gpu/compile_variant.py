"""Launches one variant of the kernels once, so that it is in Triton's cache for processes to come."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Arguments: the device, tiny or full, and the variant's number."""
    device, size, index = sys.argv[1:]
    sys.path.insert(0, os.path.join(os.getcwd(), "tools"))
    from checkout import use_checkout

    use_checkout()
    if device == "cpu":
        from megatron_medha.kernels.triton.triton_interpreter import use_interpreter

        use_interpreter()
    import torch

    from experiments.gpu.kernel_parts import OneLayer, variants
    from experiments.gpu.measure import Check
    from megatron_medha.kernels.attention.backend import QueryRange
    from megatron_medha.kernels.triton.triton_backend import TritonAttention

    check = Check(device=torch.device(device), is_tiny=size == "tiny", deadline_s=float("inf"))
    variant = variants(check)[int(index)]
    backend = TritonAttention(
        check.device, group=2 if check.is_tiny else 4, prefill_tile=variant.prefill_tile,
        decode_tile=variant.decode_tile,
    )  # fmt: skip
    num_tokens = 40 if check.is_tiny else 4000  # long enough for parts, which the merge kernel puts together
    world = OneLayer(check, [num_tokens + 9, num_tokens], backend, variant.kv_dtype)
    q = world.queries(10)
    k, v = (torch.randn(10, world.heads, world.dim, device=check.device).bfloat16() for _ in range(2))
    ranges = [QueryRange(0, 9, num_tokens, world.tables[0]), QueryRange(9, 1, num_tokens - 1, world.tables[1])]
    plan = backend.plan(ranges)
    backend.attend(plan, q, k, v, world.layer, 0.1)
    backend.attend_with_lse(plan, q, k, v, world.layer, 0.1)
    check.synchronize()


if __name__ == "__main__":
    main()
