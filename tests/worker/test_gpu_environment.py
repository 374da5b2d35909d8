"""What a rank on a GPU sets before CUDA and NCCL read it."""

from __future__ import annotations

from megatron_medha.worker.startup.gpu_environment import set_gpu_environment


def test_what_the_user_has_set_is_obeyed_and_the_rest_is_set() -> None:
    environment = {"NCCL_MAX_P2P_NCHANNELS": "8", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    set_gpu_environment(environment)
    assert environment["NCCL_MAX_P2P_NCHANNELS"] == "8"
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "PYTORCH_ALLOC_CONF" not in environment  # the older name of the same
