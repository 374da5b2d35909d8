"""Environment variables that a rank on a GPU sets before CUDA and NCCL read them. No torch here."""

from __future__ import annotations

from collections.abc import MutableMapping

_SETTINGS = {
    # A receive that is posted ahead of time is a kernel that waits on multiprocessors until the other stage sends, one
    # per channel; the attention's grid is cut for all of them. Two channels carry a stage's hidden states.
    "NCCL_MAX_P2P_NCHANNELS": "2",
    # By default 8 hardware queues: such a receive could then stand before a compute stream's kernels in the same one.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Graphs are captured again by each rank alone when its block tables have grown; registering buffers at capture
    # would wait for the other ranks.
    "NCCL_GRAPH_REGISTER": "0",
    # Steps of every size would otherwise cut the memory beside KV into pieces that no large chunk fits into.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
_OTHER_NAMES = {"PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")}  # of torch before 2.9


def set_gpu_environment(environment: MutableMapping[str, str]) -> None:
    """Set what is not set already; what the user has set is obeyed."""
    for name, value in _SETTINGS.items():
        if not any(other in environment for other in _OTHER_NAMES.get(name, ())):
            environment.setdefault(name, value)
