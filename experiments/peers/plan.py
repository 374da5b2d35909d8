"""Which server does what, in which order: visits, each one start of a server with some cells; and the named plans."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.peers.load import Decode, Load, LongsAtOnce, Mixed, Prefill, Seen

LONGS_8K, LONGS_16K = (8192, 16384), (16384, 32768)
START_S = 30.0   # expected of a server's start and warm-up
FEW_ABOVE = 4096  # longer prompts take so long that one is steady enough


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on one server: what is measured, written and resumed as a whole."""

    server: str
    load: str      # prefill-8192, decode-1, mixed-8192-16384, longs-4
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.server}.{self.load}.{self.seed}"


    @property
    def expected_s(self) -> float:
        """Roughly, on two cores: so that the time that is left can be told."""
        kind, _, size = self.load.partition("-")
        if kind == "prefill":
            # 32K takes a minute, 8K ten seconds.
            return int(size) / 1000 * (1.0 + int(size) / 32768)
        return {"decode": 20.0, "mixed": 220.0, "longs": 90.0}[kind]


@dataclass(frozen=True, slots=True)
class Visit:
    """A server that is started for some cells."""

    server: str
    cells: tuple[Cell, ...]

    @property
    def expected_s(self) -> float:
        """With the start, most of which is vLLM's compiling."""
        return sum(cell.expected_s for cell in self.cells) + START_S


@dataclass(frozen=True, slots=True)
class Sizes:
    """What can be made smaller to fit the time there is."""

    lengths: tuple[int, ...] = (1024, 8192, 16384, 32768)
    repeats: int = 3
    num_requests: int = 100
    num_requests_16k: int = 60     # they take several times as long
    longs_tokens: int = 12288      # of each of the eight long prompts of longs-N
    utilisation: float = 0.7


def visit(server: str, seed: int, loads: Sequence[str]) -> Visit:
    """These loads, in this order."""
    return Visit(server, tuple(Cell(server, load, seed) for load in loads))


def solo_loads(sizes: Sizes) -> list[str]:
    """Lone prompts and decodes."""
    return [*(f"prefill-{length}" for length in sizes.lengths), "decode-1", "decode-8"]


def mixed_load(long_tokens: tuple[int, int]) -> str:
    """By the lengths of its long prompts."""
    return f"mixed-{long_tokens[0]}-{long_tokens[1]}"


LONGS = [f"longs-{at_once}" for at_once in (1, 2, 4, 8)]
_CELL_NAME = re.compile(r"(.+)\.((?:prefill|decode|longs)-[1-9]\d*|mixed-[1-9]\d*-[1-9]\d*)\.(\d+)")


def named_visits(names: Sequence[str], known: Collection[str]) -> list[Visit]:
    """Cells by the names of their files; a server is started once for all of its own, in the order they are named.

    Raises SystemExit for what is no cell of a known server.
    """
    cells: dict[str, list[Cell]] = {}
    for name in dict.fromkeys(names):
        parts = _CELL_NAME.fullmatch(name)
        if parts is None or parts[1] not in known:
            raise SystemExit(
                f"--cells: {name} is no cell; one is SERVER.LOAD.SEED, as in medha.longs-4.11, of {', '.join(known)}"
            )
        cells.setdefault(parts[1], []).append(Cell(parts[1], parts[2], int(parts[3])))
    return [Visit(server, tuple(own)) for server, own in cells.items()]


def plans(sizes: Sizes) -> dict[str, list[Visit]]:
    """By name, in order of importance: whoever stops one in the middle has what matters most."""
    solo, near, far = solo_loads(sizes), mixed_load(LONGS_8K), mixed_load(LONGS_16K)
    smoke = [
        visit("vllm", 1, ["prefill-1024", "decode-8", near]),
        visit("medha", 1, ["prefill-1024", "decode-1", "decode-8", near, "longs-8"]),
        visit("vllm-cap-64", 1, [near]),
        visit("llama.cpp", 1, ["prefill-1024", "decode-1", "decode-8", near]),
    ]
    # The longest lone prompts take minutes on some servers: they come last.
    first, last = [load for load in solo if load != "prefill-32768"], [load for load in solo if load == "prefill-32768"]
    quick = [
        visit("vllm", 11, [*first, near]),
        visit("medha", 11, [*first, near]),
        visit("vllm-cap-64", 11, [near]),
        visit("llama.cpp", 11, first),
        visit("vllm-float32", 11, first),
        visit("medha", 12, [near, *LONGS]),
        visit("vllm", 12, [near]),
        visit("vllm-cap-64", 12, [near]),
        visit("llama.cpp", 12, [near]),
        visit("medha", 13, [*first, *last, near, far]),
        visit("vllm", 13, [*last, far]),
        visit("vllm-cap-64", 13, [far]),
        visit("vllm-float32", 13, [*last, near]),
        visit("vllm-float32-cap-64", 13, [near]),
        visit("llama.cpp", 13, last),
    ]
    full = [
        *quick,
        visit("vllm-cap-128", 11, [near]),
        visit("vllm-cap-128", 12, [near]),
        visit("vllm-cap-64", 15, [near, *LONGS]),
        visit("medha", 15, [*solo, near, far, *LONGS]),
        visit("vllm", 15, [*solo, near, far]),
        visit("vllm-cap-64", 16, [far]),
        visit("medha", 16, [far]),
        visit("llama.cpp", 15, [*solo, near]),
        visit("llama.cpp-b256", 15, [*solo, near]),
        visit("vllm-cap-128", 15, [*LONGS, far]),
    ]
    return {"smoke": smoke, "quick": quick, "full": full}


def load_of(cell: Cell, sizes: Sizes, store: Store, rate: float | None, rate_from: str) -> Load:
    """What the cell's name stands for. Raises SystemExit where a mixed stream's rate cannot be known yet."""
    kind, _, rest = cell.load.partition("-")
    if kind == "prefill":
        length = int(rest)
        return Prefill(length, sizes.repeats if length <= FEW_ABOVE else 1)
    if kind == "decode":
        return Decode(int(rest), sizes.repeats)
    if kind == "longs":
        return LongsAtOnce(int(rest), sizes.longs_tokens)
    low, _, high = rest.partition("-")
    long_tokens = int(low), int(high)
    num_requests = sizes.num_requests if long_tokens == LONGS_8K else sizes.num_requests_16k
    return Mixed(num_requests, rate or store.rate(rate_from, long_tokens, sizes.utilisation), long_tokens)


class Store:
    """The cells that are done, a file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, cell: Cell) -> bool:
        """Whether it need not be run again."""
        return self._path(cell).exists()

    def write(self, cell: Cell, seen: Seen, about: dict[str, Any]) -> None:
        """At once and whole: an interrupted run leaves no half of a file."""
        values = {"cell": asdict(cell), **about, "seen": asdict(seen)}
        draft = self._path(cell).with_suffix(".draft")
        draft.write_text(json.dumps(values, indent=1))
        draft.rename(self._path(cell))

    def read_all(self) -> list[dict[str, Any]]:
        """Every cell there is, in order of name."""
        return [json.loads(path.read_text()) for path in sorted(self._directory.glob("*.json"))]

    def rates_of(self, server: str) -> dict[str, float]:
        """Median tokens/s of its lone prompts and decodes so far, by load."""
        found: dict[str, list[float]] = {}
        for one in self.read_all():
            if one["cell"]["server"] == server and one["seen"]["rates"]:
                found.setdefault(one["cell"]["load"], []).extend(one["seen"]["rates"])
        return {load: median(rates) for load, rates in found.items()}

    def rate(self, server: str, long_tokens: tuple[int, int], utilisation: float) -> float:
        """Requests/s that keep that server so busy, by its lone prompts and its decodes in a batch of 8.

        Kept in a file once it is known: every server gets the same stream, whatever is measured later.
        """
        path = self._directory / f"rate-{long_tokens[0]}-{long_tokens[1]}.txt"
        if not path.exists():
            path.write_text(f"{self._rate(server, long_tokens, utilisation):.4g}\n")
        return float(path.read_text())

    def _rate(self, server: str, long_tokens: tuple[int, int], utilisation: float) -> float:
        rates = self.rates_of(server)
        seconds = sorted((int(load[8:]), int(load[8:]) / rate) for load, rate in rates.items() if "prefill" in load)
        if not seconds or "decode-8" not in rates:
            raise SystemExit(
                f"the mixed stream's rate comes from lone prompts and decodes of {server}, which were not measured; "
                "give --rate, or another --rate-from"
            )
        short_s = _at(seconds, 160.0) + 40.0 / rates["decode-8"]
        long_s = _at(seconds, sum(long_tokens) / 2) + 24.0 / rates["decode-8"]
        return utilisation / (0.95 * short_s + 0.05 * long_s)

    def _path(self, cell: Cell) -> Path:
        return self._directory / f"{cell.name}.json"


def _at(seconds: list[tuple[int, float]], num_tokens: float) -> float:
    """Straight lines between the lengths that were measured; in proportion beyond them."""
    for (x0, y0), (x1, y1) in zip(seconds, seconds[1:], strict=False):
        if x0 <= num_tokens <= x1:
            return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)
    x, y = seconds[0] if num_tokens < seconds[0][0] else seconds[-1]
    return y * num_tokens / x
