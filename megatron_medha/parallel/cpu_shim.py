"""Makes Megatron-core run without CUDA. The one place where a library is patched.

Megatron-core 0.14 to 0.19 passes torch.cuda.current_device() as a device= argument and calls
torch.cuda.synchronize() whether or not there is a GPU (tensor-parallel gather, dist_checkpointing.save, ...).
"""

from __future__ import annotations

import torch


def allow_megatron_without_cuda() -> None:
    """Let those calls answer "cpu" and do nothing when there is no CUDA device; does nothing where there is one."""
    # The condition asks for a usable device, not a CUDA build: a CUDA build without a driver fails the same way.
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # Core 0.16 looks the name up, and does not define it without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # There it takes a stand-in for Transformer Engine's class, which isinstance refuses.
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False

    # Stands in for model_parallel_cuda_manual_seed: this tracker's fork() is a null context, no CUDA generator.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
