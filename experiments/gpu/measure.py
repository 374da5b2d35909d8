"""What the parts of the GPU check share: cases, the clock, rows of the table."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

_CYCLES_PER_S = 2e9  # of the device's clock, about
_MAX_SLEEP_S = 0.2
_MORE_THAN_CACHE_BYTES = 256 << 20  # an H200 has 60 MB
_PIECE_BLOCKS = 4096  # random numbers come in fp32


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure beside its bar."""

    what: str
    figure: float
    unit: str
    bar: float | None = None
    is_bar_a_ceiling: bool = False  # True: lower is better
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met; nothing where there is none."""
        if self.bar is None:
            return ""
        return "met" if (self.figure <= self.bar if self.is_bar_a_ceiling else self.figure >= self.bar) else "MISSED"

    def text(self) -> str:
        """One line of the table."""
        bar = "" if self.bar is None else f"{'<=' if self.is_bar_a_ceiling else '>='} {self.bar:.3g}"
        return f"{self.what:<66} {self.figure:>10.4g} {self.unit:<9} {bar:>9} {self.verdict:<7}{self.note}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {**asdict(self), "figure": None if math.isnan(self.figure) else self.figure, "verdict": self.verdict}


@dataclass(slots=True)
class Check:
    """The process that computes cases: where, how large, how long, and what earlier ones have found out."""

    device: torch.device
    is_tiny: bool
    deadline_s: float  # on time.monotonic
    say: Callable[[dict[str, Any]], None] = lambda message: None  # to the process that watches this one
    leave_out: frozenset[tuple[str, str]] = frozenset()
    seed: int = 0
    facts: dict[str, float] = field(default_factory=dict)  # measured rates that later parts are held against
    rows: list[Row] = field(default_factory=list)  # of the case at hand
    part: str = ""

    def case(self, name: str, limit_s: float, work: Callable[[], Any]) -> None:
        """Do `work`, which adds rows, unless that is done; what it raises costs these rows alone.

        limit_s: after so many seconds this process is ended from outside.
        """
        if (self.part, name) in self.leave_out:
            return
        if not self.has_time(min(limit_s, 20.0) / 2):
            print(f"--- {self.part}: {name}: no time left", flush=True)
            return
        self.say({"part": self.part, "begin": name, "limit_s": limit_s})
        self.rows, error, started_s = [], None, time.monotonic()
        try:
            work()
            self.synchronize()  # what fails on the device is said later, and is this case's
        except Exception:  # outermost: it is in the file, and counted in the exit code
            error = traceback.format_exc()
            print(error, flush=True)
        rows = [row.as_dict() for row in self.rows]
        took_s = time.monotonic() - started_s
        self.say({"part": self.part, "case": name, "rows": rows, "error": error, "seconds": round(took_s, 1)})
        if error is not None and not self.device_answers():
            print("--- the device does not answer this process any more; a new one goes on", flush=True)
            raise SystemExit(1)
        self.free_memory()  # after the except clause: the exception held what the case had on the device

    def note(self, name: str, figure: float) -> None:
        """Remember a fact, also for processes after this one."""
        self.facts[name] = figure
        self.say({"fact": name, "figure": figure})

    @property
    def is_cuda(self) -> bool:
        """Whether this is a measurement or a rehearsal."""
        return self.device.type == "cuda"

    def add(self, row: Row) -> None:
        """Take a figure into the table and say it."""
        self.rows.append(row)
        print(row.text(), flush=True)

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether so much time is left before the end of the run."""
        return time.monotonic() + seconds < self.deadline_s

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time_s(self, work: Callable[[], Any], *, budget_s: float = 0.2, is_cold: bool = False) -> float:
        """Median seconds of `work` on the device, by events; one run where this is a rehearsal.

        is_cold: what `work` reads is not in the cache when it begins.
        """
        work()
        if not self.is_cuda:
            started_s = time.perf_counter()
            work()
            return time.perf_counter() - started_s
        self.synchronize()
        started_s = time.perf_counter()
        work()
        enqueued_s = time.perf_counter() - started_s
        self.synchronize()
        count = max(3, min(50, int(budget_s / max(time.perf_counter() - started_s, 1e-6))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        other = torch.empty(_MORE_THAN_CACHE_BYTES if is_cold else 0, dtype=torch.uint8, device=self.device)
        # The device is kept busy until all is enqueued: it would otherwise wait between kernels for a host that takes
        # longer over a launch than they run, and that would be the figure.
        torch.cuda._sleep(int(_CYCLES_PER_S * min(_MAX_SLEEP_S, 2 * count * (enqueued_s + 2e-5))))
        for begin, end in events:
            other.zero_()
            begin.record()
            work()
            end.record()
        self.synchronize()
        times = sorted(begin.elapsed_time(end) * 1e-3 for begin, end in events)
        return times[len(times) // 2]

    def device_answers(self) -> bool:
        """Whether it still computes for this process: after an illegal access it does not, whatever is asked."""
        try:
            return bool(torch.ones(2, device=self.device).sum().item() == 2.0)
        except RuntimeError:
            return False

    def free_memory(self) -> None:
        """Give cached device memory back: the next part allocates in other sizes."""
        gc.collect()  # captured graphs hold their rank in cycles
        if self.is_cuda:
            torch.cuda.empty_cache()


def fill_with_random_kv(layer: Iterable[Tensor]) -> None:
    """Normal numbers for keys and values, scales of 1. Of zeros, products would be faster than any model's."""
    for values in layer:
        if values.dim() == 2:
            values.fill_(1.0)
            continue
        for part in values.split(_PIECE_BLOCKS):
            part.copy_(torch.randn(part.shape, device=part.device).to(part.dtype))
