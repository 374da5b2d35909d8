"""Process groups over four ranks, against the layout's own arithmetic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Forked after the imports: four fresh interpreters importing torch and Megatron take 25 s on two cores, forks 0.3 s.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.parallel.groups import build_groups, init_distributed

def check(layout, rank):
    address = f"file://{sys.argv[1]}-{layout.tp}{layout.spp}{layout.kvp}{layout.dp}"
    init_distributed(layout, rank, device=torch.device("cpu"), init_method=address)
    pgs = build_groups(layout)
    mine = lambda axis: next(group for group in layout.groups(axis) if rank in group)
    ranks = dist.get_process_group_ranks
    assert ranks(pgs.tp) == mine("tp"), "tp"
    assert ranks(pgs.kvp) == mine("kvp"), "kvp"
    assert ranks(pgs.pp) == mine("pp"), "pp"
    coord = layout.coord_of(rank)
    replicas = [r for r in range(4) if (layout.coord_of(r).tp, layout.coord_of(r).pp) == (coord.tp, coord.pp)]
    assert sorted(ranks(pgs.dp)) == replicas, "dp"
    assert pgs.cp.size() == pgs.ep.size() == 1
    total = torch.tensor([rank])
    dist.all_reduce(total, group=pgs.kvp)
    assert total.item() == sum(mine("kvp")), "all_reduce"
    stages = mine("pp")
    assert (pgs.embd is None) == (rank not in (stages[0], stages[-1])), "embd"
    assert (pgs.pos_embd is None) == (rank != stages[0]), "pos_embd"
    dist.barrier()

def check_in_four_processes(layout):
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

LAYOUTS = [dict(tp=2, kvp=2), dict(spp=4), dict(spp=2, kvp=2), dict(tp=2, spp=2), dict(kvp=2, dp=2)]
sys.exit(max(check_in_four_processes(ParallelLayout(**degrees)) for degrees in LAYOUTS))
"""


def test_groups_hold_the_ranks_of_the_layout(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "meeting")],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert outcome.returncode == 0, outcome.stderr
