"""Which server does what, in which order: visits, each one start of a server with some cells; and the named plans."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.peers.load import Decode, LongsAtOnce, Mixed, Prefill
from experiments.peers.sessions import BesideSessions, Sessions

if TYPE_CHECKING:
    from experiments.peers.store import Store

LONGS_8K, LONGS_16K = (8192, 16384), (16384, 32768)
NUM_BESIDE = 4    # sessions beside the mixed stream
START_S = 30.0   # expected of a server's start and warm-up
FEW_ABOVE = 4096  # longer prompts take so long that one is steady enough

Load = Prefill | Decode | Mixed | LongsAtOnce | Sessions | BesideSessions


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on one server: what is measured, written and resumed as a whole."""

    server: str
    load: str      # prefill-8192, decode-1, mixed-8192-16384, longs-4, sessions-8-16384, beside-4-16384
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.server}.{self.load}.{self.seed}"

    @property
    def expected_s(self) -> float:
        """Roughly, on two cores: so that the time that is left can be shown."""
        kind, _, size = self.load.partition("-")
        if kind == "prefill":
            # 32K takes a minute, 8K ten seconds.
            return int(size) / 1000 * (1.0 + int(size) / 32768)
        if kind == "sessions":
            # Half of the time is pauses.
            num_sessions, _, context = size.partition("-")
            return int(num_sessions) * 2 * int(context) / 1000 * (1.0 + int(context) / 32768)
        return {"decode": 20.0, "mixed": 220.0, "longs": 90.0, "beside": 220.0}[kind]


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
    session_context: int = 16384   # that sessions grow to
    session_utilisation: float = 0.5
    beside_utilisation: float = 0.2   # by sessions beside the mixed stream


def visit(server: str, seed: int, loads: Sequence[str]) -> Visit:
    """These loads, in this order."""
    return Visit(server, tuple(Cell(server, load, seed) for load in loads))


def solo_loads(sizes: Sizes) -> list[str]:
    """Lone prompts and decodes."""
    return [*(f"prefill-{length}" for length in sizes.lengths), "decode-1", "decode-8"]


def mixed_load(long_tokens: tuple[int, int]) -> str:
    """By the lengths of its long prompts."""
    return f"mixed-{long_tokens[0]}-{long_tokens[1]}"


def calibration_loads(context_len: int) -> list[str]:
    """Lone prompts up to a session's context, uncached: what new tokens at a context take is computed from them."""
    return [f"prefill-{length}" for length in (256, 1024, 4096, 16384) if length < context_len] + [
        f"prefill-{context_len}"
    ]


LONGS = [f"longs-{at_once}" for at_once in (1, 2, 4, 8)]
_CELL_NAME = re.compile(r"(.+)\.((?:prefill|decode|longs)-[1-9]\d*|(?:mixed|sessions|beside)-[1-9]\d*-[1-9]\d*)\.(\d+)")


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
    """By name, in order of importance: one that is stopped in the middle has what matters most."""
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
    return {
        "smoke": smoke, "quick": quick, "full": full, "lone": _lone_plan(sizes),
        "sessions-quick": _quick_sessions_plan(), "sessions": _sessions_plan(sizes.session_context),
    }  # fmt: skip


def _lone_plan(sizes: Sizes) -> list[Visit]:
    """Lone prompts and decodes of every server, twice in turn; float32 and 8-bit weights once."""
    solo = solo_loads(sizes)
    visits = []
    for seed in (11, 12):
        visits += [
            visit("vllm", seed, [*solo, "decode-32"]),
            visit("medha", seed, [*solo, "decode-32"]),
            visit("llama.cpp", seed, solo),
            visit("llama.cpp-32-slots", seed, ["decode-32"]),
            visit("llama.cpp-f16", seed, solo),
            visit("llama.cpp-f16-32-slots", seed, ["decode-32"]),
        ]
    return [
        *visits,
        visit("llama.cpp-q8_0", 11, solo),
        visit("llama.cpp-q8_0-32-slots", 11, ["decode-32"]),
        visit("vllm-float32", 11, [*solo, "decode-32"]),
    ]


def _quick_sessions_plan() -> list[Visit]:
    """Does all of it run: five minutes with `--requests 20 --repeats 1`."""
    context = 4096
    alone, sessions, near = calibration_loads(context), f"sessions-4-{context}", mixed_load(LONGS_8K)
    return [
        visit("vllm", 1, [*alone, "decode-8", sessions]),
        visit("medha", 1, [*alone, sessions, near, f"beside-{NUM_BESIDE}-{context}"]),
        visit("llama.cpp", 1, [*alone, sessions]),
    ]


def _sessions_plan(context: int) -> list[Visit]:
    """One session and eight, three seeds; the mixed stream without sessions and beside them."""
    loads = [*calibration_loads(context), f"sessions-8-{context}", f"sessions-1-{context}"]
    stream = [mixed_load(LONGS_8K), f"beside-{NUM_BESIDE}-{context}"]
    visits = []
    for seed in (11, 12, 13):
        visits += [
            visit("vllm", seed, ["decode-8", *loads]),
            visit("medha", seed, [*loads, *stream]),
            visit("llama.cpp", seed, loads),
        ]
    return [*visits, visit("vllm-cap-64-cached", 11, stream), visit("vllm", 11, stream)]


def load_of(
    cell: Cell, sizes: Sizes, store: Store, rate: float | None, rate_from: str, think_s: float | None = None
) -> Load:
    """What the cell's name stands for; rate, think_s: instead of what keeps rate_from busy as `sizes` says.

    Raises SystemExit where a mixed stream's rate or the sessions' pauses cannot be known yet.
    """
    kind, _, rest = cell.load.partition("-")
    if kind == "prefill":
        length = int(rest)
        return Prefill(length, sizes.repeats if length <= FEW_ABOVE else 1)
    if kind == "decode":
        return Decode(int(rest), sizes.repeats)
    if kind == "longs":
        return LongsAtOnce(int(rest), sizes.longs_tokens)
    low, high = (int(number) for number in rest.split("-"))
    if kind == "mixed":
        num_requests = sizes.num_requests if (low, high) == LONGS_8K else sizes.num_requests_16k
        return Mixed(num_requests, rate or store.rate(rate_from, (low, high), sizes.utilisation), (low, high))
    utilisation = sizes.session_utilisation if kind == "sessions" else sizes.beside_utilisation
    sessions = Sessions(low, high, think_s or store.think_s(rate_from, cell.load, utilisation))
    if kind == "sessions":
        return sessions
    stream_rate = rate or store.rate(rate_from, LONGS_8K, sizes.utilisation)
    return BesideSessions(Mixed(sizes.num_requests, stream_rate, LONGS_8K, text="mixed beside sessions"), sessions)
