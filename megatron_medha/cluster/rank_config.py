"""What one rank is told when it starts. It travels as JSON on the rank's command line."""

from __future__ import annotations

import msgspec

from megatron_medha.core.layout import ParallelLayout


def connection_name(rank: int, what: str, token: str) -> bytes:
    """What a rank's connection calls itself; what: "" for that of its steps."""
    return "-".join(part for part in (f"rank-{rank}", what, token) if part).encode()


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a rank needs to load its share of the model and find the front process."""

    rank: int = 0
    layout: ParallelLayout = ParallelLayout()
    init_method: str | None = None   # where the ranks of the layout meet (torch.distributed); None: there is only one
    front_endpoint: str              # ZeroMQ address of the front's ROUTER socket
    link_token: str = ""             # part of its connections' names: others cannot take them before it does
    key_file: str | None = None      # keys of an encrypted connection (curve_keys.py); None: it is not encrypted
    checkpoint: str                  # directory: Megatron torch_dist or Hugging Face safetensors
    tokenizer: str | None = None     # directory with tokenizer.json, read for structured output; None: the checkpoint
    device: str = "auto"             # auto, cpu, cuda
    dtype: str = "auto"              # auto (the checkpoint's own), float32, bfloat16
    block_size: int | None = None    # tokens per KV block; None: what the attention backend works best with
    kv_memory_bytes: int | None      # for all KV blocks of this rank; None: kv_memory_share of free device memory
    kv_memory_share: float = 0.5     # read only on a GPU, and while kv_memory_bytes is None
    kv_dtype: str = "auto"           # auto (the model's), fp8_e4m3
    fp8: str = "none"                # recipe of linear layers: none, tensorwise, blockwise
    weight_dtype: str = "auto"       # of linear layers: auto (the model's), int8 (bf16 models on a CPU)
    cuda_graphs: bool = True         # read only on a GPU
    # Tokens of one request on one kvp rank: index i of a chunk's kvp_ranks holds [i*S, (i+1)*S).
    # None: core/kv/kv_memory.py's default, which the front knows too.
    max_tokens_per_shard: int | None = None
    max_context_len: int | None = None  # None: the checkpoint's own
    num_threads: int | None = None   # None: its share of the CPU cores it may use
    attention_backend: str = "auto"
    is_audited: bool = False         # whether it counts its KV blocks a second time and sends the sums
