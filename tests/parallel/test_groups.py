"""Process groups over four ranks, against the layout's own arithmetic."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from megatron_medha.cluster.launch import loopback_environment

# Forked after the imports: four fresh interpreters importing torch and Megatron take 25 s on two cores, forks 0.3 s.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.groups import build_groups, init_distributed, use_links_once

def check(layout, rank):
    address = f"file://{sys.argv[1]}-{layout.tp}{layout.spp}{layout.kvp}{layout.dp}"
    init_distributed(layout, rank, device=torch.device("cpu"), init_method=address)
    pgs = build_groups(layout)
    mine = lambda axis: next(group for group in layout.groups(axis) if rank in group)
    ranks = dist.get_process_group_ranks
    assert ranks(pgs.tp) == mine("tp"), "tp"
    assert ranks(pgs.kvp) == mine("kvp"), "kvp"
    assert ranks(pgs.pp) == mine("spp"), "pp"
    coord = layout.coord_of(rank)
    replicas = [r for r in range(4) if (layout.coord_of(r).tp, layout.coord_of(r).spp) == (coord.tp, coord.spp)]
    assert sorted(ranks(pgs.dp)) == replicas, "dp"
    assert pgs.cp.size() == pgs.ep.size() == 1
    total = torch.tensor([rank])
    dist.all_reduce(total, group=pgs.kvp)
    assert total.item() == sum(mine("kvp")), "all_reduce"
    stages = mine("spp")
    assert (pgs.embd is None) == (rank not in (stages[0], stages[-1])), "embd"
    assert (pgs.pos_embd is None) == (rank != stages[0]), "pos_embd"
    use_links_once(pgs, torch.device("cpu"))  # neither waits for ever nor leaves a message behind
    if rank != stages[0]:
        arriving = dist.irecv(number := torch.zeros(1), group=pgs.pp, group_src=pgs.pp.rank() - 1)
    if rank != stages[-1]:
        dist.send(torch.full((1,), 7.0), group=pgs.pp, group_dst=pgs.pp.rank() + 1)
    if rank != stages[0]:
        arriving.wait()
        assert number.item() == 7.0, "a link's first message is still there"
    dist.barrier()

def in_four_processes(check, layout):
    children = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                check(layout, rank)
            except BaseException as error:
                print(layout, rank, repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)

def listening():
    # Addresses that this process listens on, as /proc writes them.
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in paths if os.path.lexists(path)]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}")]
    return {words[1].rpartition(":")[0] for words in lines if words[3] == "0A" and words[9] in inodes}

def check_listeners(layout, rank):
    init_distributed(layout, rank, device=torch.device("cpu"), init_method=f"tcp://127.0.0.1:{sys.argv[2]}")
    build_groups(layout)
    dist.barrier()
    assert listening() == {"0100007F"}, listening()  # 127.0.0.1
    dist.barrier()

LAYOUTS = [dict(tp=2, kvp=2), dict(spp=4), dict(spp=2, kvp=2), dict(tp=2, spp=2), dict(kvp=2, dp=2)]
codes = [in_four_processes(check, ParallelLayout(**degrees)) for degrees in LAYOUTS]
sys.exit(max(*codes, in_four_processes(check_listeners, ParallelLayout(tp=2, spp=2))))
"""


def test_groups_hold_the_ranks_of_the_layout_and_listen_on_the_given_address_alone(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "meeting"), str(port)],
        env={**os.environ, **loopback_environment()},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert outcome.returncode == 0, outcome.stderr
