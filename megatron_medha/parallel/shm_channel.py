"""Small messages between kvp ranks of one machine, through memory they share.

A message of a few kilobytes through gloo takes two system calls, a wake-up of its thread and one of ours on either
side: 0.3 to 1 ms for each layer of each token on busy cores. Here it is a copy and a counter.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medha.system.scratch import remove_abandoned_files

log = logging.getLogger(__name__)

# One decode of 100 requests with 8 heads of 64 in fp32, or a chunk of 30 tokens of a large model; what is longer is
# bound by bandwidth, and goes through the group.
SLOT_BYTES = 1 << 18
_PREFIX = "medha-kvp-"
_Opened = TypeVar("_Opened")
_LINE_BYTES = 64     # a counter has a cache line of its own
_TIMEOUT_S = 1800.0  # as collectives have (parallel/groups.py)
# A peer that is about as far as we are answers within this; giving the core away each time costs little, while a
# sleep of any length takes at least 0.1 ms. Beyond it the core is left to others.
_SPIN_S = 2e-3
_SLEEP_S = 5e-5


class ShmChannel:
    """For each ordered pair of ranks a counter of messages sent, and two slots that they go to in turn.

    Two ranks write to each other in lockstep: message n + 1 leaves only when n has come back and been read. So message
    n + 2, which goes where n was, meets nobody who still reads n.
    """

    def __init__(self, path: Path, rank: int, num_ranks: int) -> None:
        """path: of a file of `size_of(num_ranks)` bytes, zeros at first."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._rank, self._num_ranks = rank, num_ranks
        num_pairs = num_ranks * num_ranks
        self._counters = memoryview(self._memory)[: num_pairs * _LINE_BYTES].cast("q")
        self._slots = torch.frombuffer(self._memory, dtype=torch.uint8, offset=num_pairs * _LINE_BYTES)
        self.links = self._addresses()

    @staticmethod
    def size_of(num_ranks: int) -> int:
        """Bytes for so many ranks."""
        return num_ranks * num_ranks * (_LINE_BYTES + 2 * SLOT_BYTES)

    @classmethod
    def open(cls, group: dist.ProcessGroup, device: torch.device) -> ShmChannel | None:
        """Of a group's ranks; None on a GPU, alone, without memory, and unless all are on one machine. Collective."""
        if device.type != "cpu" or group.size() == 1:
            return None
        return shared_file(lambda path: cls(path, group.rank(), group.size()), cls.size_of(group.size()), group)

    def last_number(self, peer: int) -> int:
        """Of the last message to a peer, and of what it has sent for it, or is about to."""
        return self._counters[self._counter(self._rank, peer)]

    def next_number(self, peer: int) -> int:
        """Of the next one."""
        return self.last_number(peer) + 1

    def slots(self, peer: int, number: int) -> tuple[Tensor, Tensor]:
        """Where the message of that number goes, and where the peer's comes; uint8.

        What has come has to be read before the message after it is sent.
        """
        return self._slot(self._rank, peer, number), self._slot(peer, self._rank, number)

    def send(self, peer: int) -> None:
        """The next message lies in its slot: let the peer have it."""
        self._counters[self._counter(self._rank, peer)] += 1

    def wait(self, peer: int, number: int) -> None:
        """Until the peer's message of that number is there. Raises TimeoutError after half an hour."""
        counters, place = self._counters, self._counter(peer, self._rank)
        if counters[place] >= number:
            return
        started_s = time.monotonic()
        while counters[place] < number:
            pause(time.monotonic() - started_s)

    def _place(self, sender: int, receiver: int) -> int:
        return sender * self._num_ranks + receiver

    def _counter(self, sender: int, receiver: int) -> int:
        return self._place(sender, receiver) * _LINE_BYTES // 8

    def _addresses(self) -> np.ndarray:
        """int64 [ranks, 6]: for each peer where even and odd messages go, where they come, and both counters."""
        first_counter = self._slots.data_ptr() - self._num_ranks**2 * _LINE_BYTES
        found = np.zeros((self._num_ranks, 6), dtype=np.int64)
        for peer in range(self._num_ranks):
            (even, even_back), (odd, odd_back) = self.slots(peer, 0), self.slots(peer, 1)
            found[peer] = [
                *(slot.data_ptr() for slot in (even, odd, even_back, odd_back)),
                first_counter + 8 * self._counter(self._rank, peer),
                first_counter + 8 * self._counter(peer, self._rank),
            ]
        return found

    def _slot(self, sender: int, receiver: int, number: int) -> Tensor:
        first = (2 * self._place(sender, receiver) + number % 2) * SLOT_BYTES
        return self._slots[first : first + SLOT_BYTES]


def shared_file(open_file: Callable[[Path], _Opened], num_bytes: int, group: dist.ProcessGroup) -> _Opened | None:
    """What all ranks of a group make of one file of so many zeros; None unless all of them can. Collective.

    Of all processors only those that write in order will do: a counter tells of what was written before it.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    directory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    told: list[str | None] = [None]
    descriptor = -1
    if group.rank() == 0:
        remove_abandoned_files(directory, _PREFIX)
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=directory)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, num_bytes)
        told = [name]
    dist.broadcast_object_list(told, group=group, group_src=0)
    assert told[0] is not None
    opened: _Opened | None = None
    with contextlib.suppress(OSError):  # on another machine, or in another container, it is not there
        opened = open_file(Path(told[0]))
    have_all = is_true_for_all(opened is not None, group)
    if group.rank() == 0:
        Path(told[0]).unlink()  # what is mapped stays
        have_all = have_all and _is_reserved(descriptor, num_bytes)
        os.close(descriptor)
    return opened if is_true_for_all(have_all, group) else None


def pause(waited_s: float) -> None:
    """Between two looks at what another process writes: soon again at first, then the core is left to others.

    Raises TimeoutError after half an hour.
    """
    if waited_s < _SPIN_S:
        os.sched_yield()
    elif waited_s < _TIMEOUT_S:
        time.sleep(_SLEEP_S)
    else:
        raise TimeoutError(f"another rank has written nothing for {_TIMEOUT_S:g} s")


def is_true_for_all(fact: bool, group: dist.ProcessGroup) -> bool:
    """Whether it is so on every rank of a group, without a GPU. Collective."""
    facts = torch.tensor([fact], dtype=torch.int32)
    dist.all_reduce(facts, dist.ReduceOp.MIN, group=group)
    return bool(facts.item())


def _is_reserved(descriptor: int, num_bytes: int) -> bool:
    """Whether the file's memory is there: where it is not, the first write to a page would be the end of the rank.

    A container's /dev/shm often has 64 MiB, whatever the machine has.
    """
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        log.warning("shared_memory_unused bytes=%d reason=%s", num_bytes, error)
        return False
    return True
