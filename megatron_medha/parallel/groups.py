"""Process groups of one rank over the axes tp, kvp, pp and dp, in the form Megatron-core takes them."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import HashStore

from megatron_medha.core.errors import ConfigError, RankError
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.cpu_shim import allow_megatron_without_cuda

# How long a collective may wait for the slowest rank: loading a large checkpoint is the longest such wait.
_TIMEOUT = timedelta(minutes=30)


@dataclass(init=False, repr=False)
class MedhaPGs(ProcessGroupCollection):
    """Megatron's collection, and the KV-parallel group, which reaches every attention layer with it."""

    # init and repr stay the parent's: it takes any of its fields as keywords and prints those that are set.
    kvp: dist.ProcessGroup = field(init=False)


def init_distributed(
    layout: ParallelLayout, rank: int, *, device: torch.device, init_method: str | None = None
) -> None:
    """Join the ranks of `layout`; does nothing when this process has joined already.

    init_method: torch.distributed's address (tcp://host:port, file:///path, env://); not needed for one rank.
    Raises ConfigError if several ranks are asked for without an address, RankError if it cannot be listened on.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if layout.world_size == 1:
        # A store in this process: no port to collide on, no file to clean up.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
        return
    if init_method is None:
        raise ConfigError(f"{layout.world_size} ranks need an address to meet at (init_method)")
    if init_method.startswith("tcp://"):
        store = _store_at(init_method, rank, layout.world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=layout.world_size, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, init_method, rank=rank, world_size=layout.world_size, timeout=_TIMEOUT)


def _store_at(address: str, rank: int, world_size: int) -> dist.TCPStore:  # type: ignore[name-defined]
    """The store at tcp://HOST:PORT. Rank 0 serves it, on that address alone: by itself it listens on all of them."""
    parts = urlsplit(address)
    host, port = parts.hostname, parts.port
    if host is None or port is None:
        raise ConfigError(f"init_method={address}: must be tcp://HOST:PORT")
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listening.bind((host, port))
                listening.listen(max(world_size, 128))
            except OSError as error:
                raise RankError(f"init_method={address}: cannot be listened on ({error.strerror})") from None
            listener = listening.detach()  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world_size, rank == 0, _TIMEOUT, master_listen_fd=listener
    )


def min_over_ranks(value: int) -> int:
    """The smallest of all ranks' values. Collective."""
    least = torch.tensor([value], dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least.item())


def build_groups(layout: ParallelLayout) -> MedhaPGs:
    """The groups this rank is in. Collective: every rank calls it, once, after `init_distributed`."""
    allow_megatron_without_cuda()
    grid = HyperCommGrid([layout.tp, layout.kvp, layout.spp, layout.dp], ["tp", "kvp", "pp", "dp"])
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(layout.world_size)])
    pgs = MedhaPGs()
    pgs.tp = grid.create_pg("tp")
    pgs.kvp = grid.create_pg("kvp")
    pgs.pp = grid.create_pg("pp")
    pgs.mp = grid.create_pg(["tp", "pp"])
    # KVP ranks hold the same weights, so towards Megatron (checkpoints, seeds) they are data-parallel replicas.
    pgs.dp = pgs.dp_cp = pgs.expt_dp = grid.create_pg(["kvp", "dp"])
    # Context and expert parallelism are not used: groups of one.
    pgs.cp = pgs.ep = alone
    pgs.tp_cp = pgs.expt_tp = pgs.tp_ep = pgs.tp
    pgs.tp_ep_pp = pgs.mp
    pgs.tp_dp_cp = grid.create_pg(["tp", "kvp", "dp"])  # of routers, for losses of training
    pgs.embd, pgs.pos_embd = _embedding_groups(grid)
    if dist.get_backend() == "nccl":
        use_links_once(pgs, torch.device("cuda"))
    return pgs


def use_links_once(pgs: MedhaPGs, device: torch.device) -> None:
    """Send one number over every link of this rank. Collective.

    NCCL makes a group's communicator at its first use, with all of its ranks, and one of two ranks at the first message
    between them: that takes seconds and blocks the host, which it should do now, not in a request's first step.
    """
    number = torch.ones(1, device=device)
    for group in (pgs.tp, pgs.kvp):
        if group.size() > 1:
            dist.all_reduce(number, group=group)
    stage, num_stages = pgs.pp.rank(), pgs.pp.size()
    # In the order of stages, so that a rank that blocks here waits for the stage before only.
    if stage > 0:
        dist.recv(number, group=pgs.pp, group_src=stage - 1)
    if stage < num_stages - 1:
        dist.send(number, group=pgs.pp, group_dst=stage + 1)
    # Tokens go back from the last stage to the first (StageLink.give_tokens).
    if num_stages > 2 and stage == num_stages - 1:
        dist.send(number, group=pgs.pp, group_dst=0)
    if num_stages > 2 and stage == 0:
        dist.recv(number, group=pgs.pp, group_src=num_stages - 1)


def _embedding_groups(grid: HyperCommGrid) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """First and last stage (tied embeddings live on both), and first stage alone; None on ranks in neither."""
    embedding: dist.ProcessGroup | None = None
    position: dist.ProcessGroup | None = None
    rank = dist.get_rank()
    for stages in grid.get_rank_enum("pp"):
        ends = sorted({stages[0], stages[-1]})
        ends_group, first_group = dist.new_group(ends), dist.new_group(stages[:1])
        if rank in ends:
            embedding = ends_group
        if rank == stages[0]:
            position = first_group
    return embedding, position
