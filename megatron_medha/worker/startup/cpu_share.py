"""How a rank shares cores and memory with its neighbours. No torch here: it must be settled before torch is loaded."""

from __future__ import annotations

import os

from megatron_medha.system.machine import num_usable_cores

_NICE = 5  # a third of the weight of other processes


def num_threads_of_rank(wanted: int | None, num_ranks: int) -> int:
    """Threads of one rank: as many as asked for, or its share of the cores.

    num_ranks: of the layout; they share this machine's cores unless a launcher says how many run here.
    """
    if wanted is not None:
        return wanted
    return max(1, num_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))


def set_passive_omp_wait(num_threads: int) -> None:
    """Make OpenMP threads sleep at barriers when they fill every core; must run before torch is imported.

    By default they spin. As soon as another process (the API server, a client) wants one of the cores, spinning threads
    use up the time slices of those they wait for: beside one busy process on 2 cores, a decode step took 32 ms at
    the median and 330 ms at p90 where sleeping threads take 11 and 15; 1,024 tokens of prefill 2.6 s against 0.6.
    Alone on the machine, sleeping costs 10 to 30% of a small decode step. OMP_WAIT_POLICY, where set, is obeyed.
    """
    if num_threads > 1 and num_threads >= num_usable_cores():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def give_way(num_threads: int, num_ranks: int) -> None:
    """Let other processes go first where ranks fill all cores: on this thread and on those it starts, which compute.

    An API server that streams tokens beside two computing threads on two cores otherwise waits for a time slice each
    time it wakes up, and so does every thread that a message passes through.
    """
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if num_threads * num_here >= num_usable_cores() and hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICE)  # Linux: of one thread


def limit_kernel_cache() -> None:
    """Keep fewer of oneDNN's compiled kernels; must run before torch is imported.

    It keeps one per shape, 1,024 of them by default, and every step of a server has a shape of its own: a rank of the
    tiny model grew by 270 MiB until it had that many. A step of decodes needs a few dozen.
    ONEDNN_PRIMITIVE_CACHE_CAPACITY, where set, is obeyed.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
