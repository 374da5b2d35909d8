"""The configuration of one rank. It travels as JSON on the rank's command line."""

from __future__ import annotations

import msgspec

from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.kv.kv_config import NO_PREFIX_CACHE, KVConfig
from megatron_medha.core.layout import ParallelLayout


def connection_name(rank: int, what: str, token: str) -> bytes:
    """What a rank's connection calls itself; what: "" for that of its steps."""
    return "-".join(part for part in (f"rank-{rank}", what, token) if part).encode()


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a rank needs to load its share of the model and find the API server."""

    rank: int = 0
    layout: ParallelLayout = ParallelLayout()
    init_method: str | None = None   # where the ranks of the layout meet (torch.distributed); None: there is only one
    server_endpoint: str              # ZeroMQ address of the API server's ROUTER socket
    link_token: str = ""             # part of its connections' names: others cannot take them before it does
    key_file: str | None = None      # keys of an encrypted connection (curve_keys.py); None: it is not encrypted
    checkpoint: str                  # directory, or a GGUF file
    tokenizer: str | None = None     # where that is, if not in the checkpoint; read for structured output
    model: ModelOptions = ModelOptions()
    kv_memory_bytes: int | None      # for all KV blocks of this rank; None: model.kv_memory_share of free GPU memory
    max_batch_tokens: int = 8192     # in a step; what GPU memory beside KV must suffice for
    # Tokens of one request on one kvp rank: index i of a chunk's kvp_ranks holds [i*S, (i+1)*S). None: the rank says.
    max_tokens_per_shard: int | None = None
    kv: KVConfig = NO_PREFIX_CACHE
    is_audited: bool = False         # whether it counts its KV blocks a second time and sends the sums
