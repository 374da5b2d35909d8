"""Real ranks in processes of their own, driven through pipes by one process that stands in for the front.

Processes are forked from a server that has imported torch and Megatron already, and stay for many loads: a fresh
interpreter takes 6 s on a busy core to import them, a fork 0.3 s.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from megatron_medha.cluster.messages import RankReady, RankStep, Shutdown, StepDone, ToRank
from megatron_medha.cluster.rank_config import RankConfig
from megatron_medha.core.layout import Coord, ParallelLayout

if TYPE_CHECKING:
    from megatron_medha.worker.rank import Rank

_PRELOADED = ["megatron_medha.worker.startup.load", "megatron_medha.worker.step_loop"]
# Nothing of a tiny model takes this long, however busy the machine is: a rank that is silent for longer is stuck.
PATIENCE_S = 240.0

Prepare = Callable[["Rank", dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rank said of a step, and the logits it sampled from, which no message carries."""

    done: StepDone
    logits_RV: np.ndarray | None
    cpu_s: float              # this process's own time since its last answer, whatever else used the cores
    notes: dict[str, float]   # what the rank's `prepare` has counted since then


class RankProcesses:
    """Processes that can be ranks of any layout, one layout after the other."""

    def __init__(self, num_ranks: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._directory = tempfile.TemporaryDirectory()
        self._meetings = itertools.count()
        self._num_ranks = num_ranks
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._num_loaded = 0
        self._kept: tuple[RankConfig, list[RankReady]] | None = None
        self.layout = ParallelLayout()
        self.num_batches = 0  # for the driver, to count what these ranks have been sent

    def load(
        self, config: RankConfig, prepare: Prepare | None = None, *, keeps_logits: bool = True, is_kept: bool = False
    ) -> list[RankReady]:
        """Make the first processes the ranks of config.layout; what was loaded before is given up.

        prepare: called in each of them with its rank; what it adds to the dict travels with the next answer.
        keeps_logits: False: answers have none, and ranks take every short way that they take behind a server.
        is_kept: ranks that were loaded so, with the same configuration and nothing else, go on as they are.
        """
        is_plain = is_kept and prepare is None and not keeps_logits
        if is_plain and self._num_loaded and self._kept is not None and self._kept[0] == config:
            return self._kept[1]
        self.unload()
        self.layout, self.num_batches = config.layout, 0
        found = self.call(partial(_load, prepare=prepare, keeps_logits=keeps_logits), config)
        self._num_loaded = config.layout.world_size
        self._kept = (config, found) if is_plain else None
        return found

    def call(self, function: Callable[[RankConfig, Connection], Any], config: RankConfig) -> list[Any]:
        """Run a function in as many idle processes as config.layout has ranks; what each of them sends first."""
        if not self._processes:
            self._start()
        meeting = Path(self._directory.name) / f"meeting-{next(self._meetings)}"
        num_ranks = config.layout.world_size
        for rank, connection in enumerate(self._connections[:num_ranks]):
            own = msgspec.structs.replace(config, rank=rank, init_method=f"file://{meeting}")
            connection.send((function, own))
        return [self._receive(rank) for rank in range(num_ranks)]

    def send(self, rank: int, message: ToRank) -> None:
        """One message to one rank."""
        self._connections[rank].send_bytes(msgspec.msgpack.encode(message))

    def send_to_kvp_rank(self, kvp: int, step: RankStep) -> None:
        """A step to every rank with this kvp index."""
        layout = self.layout
        for stage in range(layout.spp):
            for tp in range(layout.tp):
                self.send(layout.rank_of(Coord(tp, kvp, stage, 0)), step)

    def answers(self, patience_s: float = PATIENCE_S) -> Iterator[Answer]:
        """What has come in, after waiting for at least one. Raises AssertionError when all ranks stay silent."""
        ready = wait(self._connections[: self._num_loaded], patience_s)
        assert ready, f"deadlock: no rank of {self.layout} has said anything for {patience_s:g} s"
        for connection in ready:
            yield self._receive(self._connections.index(connection))  # type: ignore[arg-type]

    def unload(self) -> None:
        """End the work of the ranks; the processes stay."""
        for rank in range(self._num_loaded):
            self.send(rank, Shutdown())
        for rank in range(self._num_loaded):
            # A batch is over with its last stage's answer; those of the stages before may still be under way.
            while (message := self._receive(rank)) != "over":
                assert isinstance(message, Answer), message
        self._num_loaded = 0

    def lose(self, rank: int) -> None:
        """A rank is killed in whatever it does; the others are ended as their supervisor would end them."""
        self._processes[rank].kill()
        self._processes[rank].join()
        self.end()

    def close(self) -> None:
        """End the processes, for good."""
        self.end()
        self._directory.cleanup()

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        for rank in range(self._num_ranks):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_rank_process, args=(theirs,), name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def end(self) -> None:
        """End the processes, whatever they do; the next load starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes.clear()
        self._connections.clear()
        self._num_loaded = 0

    def _receive(self, rank: int) -> Any:
        connection = self._connections[rank]
        assert connection.poll(PATIENCE_S), f"rank {rank} of {self.layout} has said nothing for {PATIENCE_S:g} s"
        message = connection.recv()
        if isinstance(message, BaseException):
            self.end()  # the others may wait for this one for ever; new ones start with the next load
            raise message
        return message


@contextmanager
def rank_processes(num_ranks: int) -> Iterator[RankProcesses]:
    """RankProcesses that are ended in the end."""
    ranks = RankProcesses(num_ranks)
    try:
        yield ranks
    finally:
        ranks.close()


class _PipeInbox:
    """A rank's Inbox over a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(ToRank)

    def wait(self) -> RankStep | Shutdown | None:
        message = self._decoder.decode(self._connection.recv_bytes())
        assert isinstance(message, RankStep | Shutdown), f"{message}: nobody sends that here"
        return message

    def poll(self) -> RankStep | Shutdown | None:
        return self.wait() if self._connection.poll() else None


def _rank_process(connection: Connection) -> None:
    """Be one rank after another until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            function, config = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            function(config, connection)
        except BaseException as error:  # outermost: the test must learn why, whatever it was
            error.add_note(traceback.format_exc())
            try:
                connection.send(error)
            except (TypeError, AttributeError):  # one that cannot be pickled
                connection.send(RuntimeError(traceback.format_exc()))


def leave_group() -> None:
    """Forget the ranks of the layout before."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _load(config: RankConfig, connection: Connection, prepare: Prepare | None, keeps_logits: bool) -> None:
    """Be a rank until told to stop."""
    import torch

    from megatron_medha.worker.startup.load import load_rank
    from megatron_medha.worker.step_loop import run_steps

    leave_group()
    rank, ready = load_rank(config, lambda what, fraction: None)
    logits: list[np.ndarray] = []
    coord = config.layout.coord_of(config.rank)
    if keeps_logits and coord.spp == config.layout.spp - 1 and coord.tp == 0:
        def keep(model: Any, args: Any, output: torch.Tensor) -> None:
            logits.append(output[0].float().numpy())

        rank.model.register_forward_hook(keep)
    if keeps_logits:
        # One forward pass for each answer: that of a step run ahead could not be told from the next.
        rank.run_ahead = lambda: False  # type: ignore[method-assign]

    notes: dict[str, float] = {}
    if prepare is not None:
        prepare(rank, notes)
    cpu_s = time.process_time()

    def answer(done: StepDone) -> None:
        nonlocal cpu_s
        before_s, cpu_s = cpu_s, time.process_time()
        connection.send(Answer(done, logits.pop() if logits else None, cpu_s - before_s, dict(notes)))
        notes.clear()

    connection.send(ready)
    run_steps(rank, _PipeInbox(connection), answer)
    connection.send("over")
