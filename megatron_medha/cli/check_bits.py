"""`medha check-bits`: plays random schedules over layouts and compares the bits of every log-probability."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.errors import ConfigError, check_range
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.options.serve_options import checkpoint_path
from megatron_medha.stats.text_table import text_table
from megatron_medha.system.checked_files import check_writable

if TYPE_CHECKING:
    from megatron_medha.bits.play import Place
    from megatron_medha.core.model_shape import ModelShape

USAGE = """\
usage: medha check-bits DIR [key=value ...]

Plays random schedules with your model on this machine's CPU: chunk sizes, traffic beside, preemptions, aborts, prefix
hits, n > 1, seeds. Every log-probability is compared, bit for bit, with that of the same tokens as one whole prompt
alone on one rank. Where bits differ it names the first operation. Started again with the same file, it goes on where
it was. Exit code 0: no bit differs; 1: some do; 2: nothing was played.

examples:
  medha check-bits checkpoints/tiny
  medha check-bits DIR model.dtype=bfloat16 tp=[1] kvp=[1,2,4] schedules=50
"""

_MIN_CONTEXT = 600  # tokens; no sequence of a schedule is longer


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckBitsOptions:
    """Everything a user can say to `medha check-bits`, as conf/check_bits.yaml lays it out."""

    checkpoint: Path | None
    tp: tuple[int, ...]
    spp: tuple[int, ...]
    kvp: tuple[int, ...]
    max_ranks: int
    schedules: int
    seed: int
    kv_gib: float
    file: Path
    model: ModelOptions

    def __post_init__(self) -> None:
        check_range("max_ranks", self.max_ranks, 1, 64)
        check_range("schedules", self.schedules, 1, 1 << 20)
        check_range("kv_gib", self.kv_gib, 0.01, 1024.0)
        if self.model.device == "cuda":
            raise ConfigError("model.device=cuda: bits are compared on the CPU; use model.device=cpu")
        if not self.layouts:
            raise ConfigError(f"max_ranks={self.max_ranks}: no layout of tp, spp and kvp has so few; give smaller ones")

    @property
    def layouts(self) -> list[ParallelLayout]:
        """All that are played."""
        degrees = itertools.product(self.tp, self.spp, self.kvp)
        found = (ParallelLayout(tp=tp, spp=spp, kvp=kvp) for tp, spp, kvp in degrees)
        return [layout for layout in found if layout.world_size <= self.max_ranks]


class _KeptResults:
    """A line for each schedule; the first one says of what."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        check_writable("file", path)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.by_schedule: dict[tuple[str, int], dict[str, Any]] = {}
        if not lines:
            self._append(settings)
        elif json.loads(lines[0]) != json.loads(json.dumps(settings)):
            raise ConfigError(f"file={path}: results of other options; name another file, or remove it")
        for line in lines[1:]:
            found = json.loads(line)
            self.by_schedule[found["layout"], found["seed"]] = found

    def keep(self, found: dict[str, Any]) -> None:
        """Write one down."""
        self.by_schedule[found["layout"], found["seed"]] = found
        self._append(found)

    def _append(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def run(words: Sequence[str]) -> int:
    """Play, compare, and say what differs."""
    options = read_options("check_bits", words, USAGE, lambda: CheckBitsOptions)
    if options is None:
        return 0
    # Of the ranks' interpreter, which imports torch and Megatron: they warn of what no user can change.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    model = replace(options.model, device="cpu", block_size=16, num_threads=options.model.num_threads or 1)
    checkpoint = checkpoint_path(options.checkpoint)
    settings = {"checkpoint": str(checkpoint.resolve()), "model": asdict(model)}
    kept = _KeptResults(options.file.expanduser(), settings)
    found = list(_played(options, checkpoint, model, kept))
    print(verdict(found))
    if all("refused" in one for one in found):
        return 2
    return 1 if any(one.get("num_other") for one in found) else 0


def _played(
    options: CheckBitsOptions, checkpoint: Path, model: ModelOptions, kept: _KeptResults
) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    from megatron_medha.bits.bit_check import check_schedule
    from megatron_medha.bits.play import Place
    from megatron_medha.bits.rank_processes import rank_processes

    num_ranks = max(layout.world_size for layout in options.layouts)
    with rank_processes(num_ranks) as ranks, tqdm(
        total=len(options.layouts) * options.schedules, unit="schedule", file=sys.stderr, leave=False
    ) as bar:
        place = Place(ranks, checkpoint, ParallelLayout(), model, int(options.kv_gib * 2**30))
        shape: ModelShape | None = None
        for layout in options.layouts:
            name = layout_name(layout)
            has_named = False  # the operation is looked for once
            for seed in range(options.seed, options.seed + options.schedules):
                if (name, seed) not in kept.by_schedule:
                    try:
                        shape = shape or _shape(place)
                        result = check_schedule(
                            seed, place._replace(layout=layout), shape.vocab_size, names_operation=not has_named
                        )
                    except ConfigError as error:  # such a layout cannot be had of this model
                        if layout.world_size == 1:
                            raise
                        yield {"layout": name, "seed": seed, "refused": str(error)}
                        break
                    kept.keep({"layout": name, "seed": seed, **result._asdict()})
                found = kept.by_schedule[name, seed]
                has_named = has_named or bool(found["num_other"])
                bar.update()
                yield found


def _shape(place: Place) -> ModelShape:
    from megatron_medha.cluster.rank_config import RankConfig

    ready, *_ = place.ranks.load(
        RankConfig(
            server_endpoint="", checkpoint=str(place.checkpoint), model=place.model,
            kv_memory_bytes=place.kv_memory_bytes,
        )
    )  # fmt: skip
    if ready.shape.max_context_len < _MIN_CONTEXT:
        raise ConfigError(f"checkpoint={place.checkpoint}: its context of {ready.shape.max_context_len} tokens is too "
                          f"short for random schedules, which need {_MIN_CONTEXT}")  # fmt: skip
    return ready.shape


def layout_name(layout: ParallelLayout) -> str:
    """For tables and files."""
    return f"tp={layout.tp} spp={layout.spp} kvp={layout.kvp}"


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """A table by layout, and in words what differs first in each."""
    rows, notes = [], []
    for name in dict.fromkeys(one["layout"] for one in found):
        own = [one for one in found if one["layout"] == name]
        played = [one for one in own if "refused" not in one]
        notes += [f"{name}: not played: {one['refused']}" for one in own if "refused" in one]
        if not played:
            continue
        counts = sum((Counter(one["counts"]) for one in played), Counter[str]())
        num_other = sum(one["num_other"] for one in played)
        rows.append([
            name, str(len(played)), str(sum(one["num_positions"] for one in played)), str(num_other),
            *(str(counts[what]) for what in ("hits", "preempted", "aborts")),
        ])  # fmt: skip
        notes += [f"{name}: schedule {one['seed']}, {one['first']}" for one in played if one["num_other"]][:1]
    head = ["layout", "schedules", "log-probabilities", "differ", "hits", "preempted", "aborted"]
    differing = [row[0] for row in rows if row[3] != "0"]
    if not rows:
        return "\n".join([*notes, "nothing was played: this model can have none of the layouts"])
    said = f"bits differ on {len(differing)} of {len(rows)} layouts" if differing else "the same bits everywhere"
    return "\n".join([text_table([head, *rows]).rstrip(), *notes, said])
