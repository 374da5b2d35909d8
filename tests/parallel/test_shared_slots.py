"""Shared memory between three processes, and the group beyond it: every bit of every part and sum arrives, in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import errno, os, sys, tempfile
import torch
import torch.distributed as dist
from megatron_medha.parallel.kv_exchange import KVExchange, RankSet
from megatron_medha.parallel.shm_channel import SLOT_BYTES, ShmChannel

make_file = tempfile.mkstemp

def make_file_and_tell(**where):
    descriptor, name = make_file(**where)
    print(name, flush=True)
    return descriptor, name

tempfile.mkstemp = make_file_and_tell
NUM_RANKS, H, D = 3, 2, 16
KINDS = [  # rank sets of a batch; a thousand rows are more than a slot takes
    [((0, 1, 2), 1)], [((0, 1), 2), ((1, 2), 3)], [((0, 2), 1), ((0, 1, 2), 4)], [((0, 1), 1000), ((1, 2), 1)],
]

def values(rank, batch, layer, kind, dtype):
    rows = sum(num for _, num in kind)
    generator = torch.Generator().manual_seed(rank + 10 * layer + 1000 * batch)
    return torch.randn(rows, H, D, generator=generator).to(dtype), torch.randn(rows, H, generator=generator)

def check(rank, slots):
    for batch in range(24):
        kind, dtype = KINDS[batch % len(KINDS)], (torch.float32, torch.bfloat16)[batch % 3 == 0]
        mine = [(ranks, num) for ranks, num in kind if rank in ranks]
        if not mine:
            continue
        sets, row = [], 0
        for ranks, num in mine:
            sets.append(RankSet(ranks, row, num))
            row += num
        exchange = KVExchange(dist.group.WORLD, sets, slots)
        keep = torch.cat([torch.full((num,), rank in ranks) for ranks, num in kind])
        for layer in range(3):
            parts = exchange.begin(*(x[keep] for x in values(rank, batch, layer, kind, dtype)))()
            for (ranks, _), found in zip(mine, parts, strict=True):
                first = sum(num for other, num in kind[: [r for r, _ in kind].index(ranks)])
                rows = slice(first, first + dict(kind)[ranks])
                for other, part in zip(ranks, found, strict=True):
                    out, lse = values(other, batch, layer, kind, dtype)
                    assert torch.equal(part.out_THD, out[rows]) and torch.equal(part.lse_TH, lse[rows]), (batch, layer)

def check_sums(group, slots, device):
    from megatron_medha.parallel.tp_all_reduce import ShmAllReduce, tp_all_reduce
    total = tp_all_reduce(group, device)
    assert isinstance(total, ShmAllReduce) == (slots is not None)
    for step in range(40):
        shape = (1 + 37 * step % 600, 1, 128)  # some are more than a slot takes
        dtype = (torch.float32, torch.bfloat16)[step % 3 == 0]
        everyone = [
            torch.randn(shape, generator=torch.Generator().manual_seed(NUM_RANKS * step + rank)).to(dtype)
            for rank in range(NUM_RANKS)
        ]
        mine = everyone[group.rank()].clone()
        total(mine)
        expected = sum(x.double() for x in everyone)
        assert (mine.double() - expected).abs().max() < (1e-6, 0.1)[dtype == torch.bfloat16], step
        found = [torch.empty_like(mine) for _ in range(NUM_RANKS)]
        dist.all_gather(found, mine)
        assert all(torch.equal(found[0], other) for other in found), step

def run(rank, path, memory):
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=NUM_RANKS)
    if memory == "elsewhere" and rank == 1:
        def is_elsewhere(*_): raise FileNotFoundError
        ShmChannel.__init__ = is_elsewhere
    if memory == "full":
        def is_full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate = is_full
    slots = ShmChannel.open(dist.group.WORLD, torch.device("cpu"))
    assert (slots is not None) == (memory == "shared")
    check(rank, slots)
    check_sums(dist.group.WORLD, slots, torch.device('cpu'))

def in_processes(path, memory):
    children = []
    for rank in range(NUM_RANKS):
        if not (pid := os.fork()):
            try:
                run(rank, path, memory)
            except BaseException as error:
                print(rank, repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)

sys.exit(in_processes(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.parametrize("memory", ["shared", "elsewhere", "full"])
def test_parts_and_sums_of_any_size_arrive_between_any_ranks_and_nothing_is_left(tmp_path: Path, memory: str) -> None:
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "meeting"), memory],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert outcome.returncode == 0, outcome.stderr
    files = [Path(line) for line in outcome.stdout.splitlines()]
    assert len(files) == 2 and not any(file.exists() for file in files), files  # of the parts, and of the sums
