"""Has every log-probability the same bits whatever the schedule and the layout?

    python -m experiments.one_bit_pattern.schedules                     # 10,000 schedules; started again, it goes on
    python -m experiments.one_bit_pattern.schedules --schedules 480     # 10 of each cell
    python -m experiments.one_bit_pattern.schedules DIR --cells "bfloat16 kvp=2"

Random schedules on real ranks: chunk sizes, traffic, preemptions, aborts, prefix hits, n > 1, seeds, top-k, top-p,
min-p, penalties, grammars, log-probabilities of prompts, steps that overtake others. 12 layouts of at most 8 ranks x
fp32 and bf16 x a dense model and one of experts: 48 cells. The conversations are the same in all cells of a model and
dtype, the schedules are not. Every log-probability, and those of the best 5 tokens, are compared with the lone run of
the same tokens: one whole prompt on one rank. A prompt has one SHA over all layouts, of all its log-probabilities.
--weights int8 or int4: the same with narrow weights (bfloat16 alone).
DIR: a checkpoint in place of the two models. --part 1/2 and --part 2/2: two processes with one --out share the cells.
Bars: no position differs, one SHA for each prompt, at least 150 schedules for each cell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from experiments.lib.process_stats import cpu_s
from experiments.lib.random_llama import save_llama
from experiments.lib.results_file import verdict
from experiments.one_bit_pattern.bit_digests import LoneRuns, sha_of
from experiments.one_bit_pattern.short_schedules import (
    MAX_TOKENS,
    Vocabulary,
    conversations,
    short_schedule,
)
from megatron_medha.bits.play import Place, Play
from megatron_medha.bits.random_schedule import BLOCK_SIZE
from megatron_medha.bits.rank_processes import RankProcesses, rank_processes
from megatron_medha.checkpoints.detect import read_model_config
from megatron_medha.cluster.model_options import ModelOptions
from megatron_medha.core.errors import ConfigError
from megatron_medha.core.kv.kv_config import KVConfig
from megatron_medha.core.layout import ParallelLayout
from megatron_medha.tiny.tiny_tokenizer import EOS_ID, save_tiny_tokenizer

LAYOUTS = {
    "lone": ParallelLayout(),
    "tp=2": ParallelLayout(tp=2),
    "tp=4": ParallelLayout(tp=4),
    "spp=2": ParallelLayout(spp=2),
    "kvp=2": ParallelLayout(kvp=2),
    "kvp=3": ParallelLayout(kvp=3),
    "kvp=4": ParallelLayout(kvp=4),
    "tp=2 spp=2": ParallelLayout(tp=2, spp=2),
    "tp=2 kvp=2": ParallelLayout(tp=2, kvp=2),
    "spp=2 kvp=2": ParallelLayout(spp=2, kvp=2),
    "tp=2 spp=2 kvp=2": ParallelLayout(tp=2, spp=2, kvp=2),
    "tp=4 kvp=2": ParallelLayout(tp=4, kvp=2),
}
DTYPES = ("float32", "bfloat16")
MODELS = ("dense", "experts")
VOCAB_SIZE = 269  # a prime: no tp divides it
LEAST_OF_A_CELL = 150
PARTITION_TOKENS = 16  # of the kvp partitions; shards are whole ones
_REGEXES = ("[a-h]{2,6}", r"[0-9]+(\.[0-9]{2})?")  # outputs may have to match one
_COUNTED = ("steps", "requests", "hits", "preempted", "aborts", "overtaking")


@dataclass(frozen=True, slots=True)
class Cell:
    """A model in a dtype on a layout."""

    model: str
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """For tables and --cells."""
        return f"{self.model} {self.dtype} {self.layout}"


class KeptSchedules:
    """A line for each schedule of a cell, written as it is played. A last line that was cut off is played again."""

    def __init__(self, directory: Path, cell: Cell, settings: dict[str, Any]) -> None:
        self._path = directory / (cell.name.replace(" ", "_") + ".jsonl")
        directory.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole, encoding="utf-8")
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] != settings:
            raise SystemExit(f"{self._path}: of other settings, {lines[0]}; name another --out, or remove it")
        self.by_seed: dict[int, dict[str, Any]] = {line["seed"]: line for line in lines[1:]}
        if not lines:
            self._append(settings)

    def keep(self, found: dict[str, Any]) -> None:
        """Write one down."""
        self.by_seed[found["seed"]] = found
        self._append(found)

    def _append(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def save_models(directory: Path) -> dict[str, Path]:
    """8 heads of 16 over 4 KV heads, widths of 128; experts: 4, of which a token has 2, and one that all have."""
    save_llama(
        directory / "dense", hidden_size=64, ffn_size=128, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16,
        vocab_size=VOCAB_SIZE, initializer_range=0.2,
    )  # fmt: skip
    _save_experts(directory / "experts")
    for model in MODELS:
        save_tiny_tokenizer(directory / model, MAX_TOKENS)
        config = directory / model / "config.json"  # the tokenizer's end token is the model's: grammars end with it
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": EOS_ID}))
    return {model: directory / model for model in MODELS}


def _save_experts(directory: Path) -> None:
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=128, moe_intermediate_size=128,
        shared_expert_intermediate_size=128, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1 << 12, initializer_range=0.2,
        norm_topk_prob=True, decoder_sparse_step=1,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(directory)


def model_options(dtype: str, options: argparse.Namespace) -> ModelOptions:
    """Kernels as the server chooses them."""
    found: dict[str, Any] = {"weight_dtype": options.weights}
    if "virtual_tp" in {field.name for field in fields(ModelOptions)}:
        found["virtual_tp"] = options.virtual_tp
    return ModelOptions(device="cpu", dtype=dtype, block_size=BLOCK_SIZE, num_threads=1, **found)


def kv_config() -> KVConfig:
    """Of ranks that stay loaded, with partitions so short that sequences have several."""
    return KVConfig(granule_tokens=BLOCK_SIZE, partition_tokens=PARTITION_TOKENS)


def vocabulary_of(checkpoint: Path) -> Vocabulary:
    """Without grammars where there is no tokenizer, or no token that ends an output."""
    config = read_model_config(checkpoint)
    if config.max_context_len < MAX_TOKENS:
        raise SystemExit(f"{checkpoint}: its context of {config.max_context_len} tokens is shorter than {MAX_TOKENS}")
    stop_token_id = next(iter(config.stop_token_ids), None)
    has_grammars = stop_token_id is not None and (checkpoint / "tokenizer.json").is_file()
    return Vocabulary(config.vocab_size, stop_token_id or 0, _grammars() if has_grammars else ())


@cache
def _grammars() -> tuple[str, ...]:
    import llguidance

    return tuple(llguidance.LLMatcher.grammar_from_regex(regex) for regex in _REGEXES)


def play_schedule(seed: int, place: Place, vocabulary: Vocabulary, lone: LoneRuns) -> dict[str, Any]:
    """One schedule: what differs from lone runs, and a SHA for each request that was not aborted."""
    case = short_schedule(seed, place.layout, conversations(seed, vocabulary))
    play = Play(case, place, has_cache=True).run()
    found = lone.compare(play)
    aborted = {turn.request_id for turn in case.turns if turn.abort_after is not None}
    shas = {name: sha_of(told) for name, told in play.told.items() if name not in aborted}
    counts = {what: play.counts[what] for what in _COUNTED}
    return {"seed": seed, **found._asdict(), "counts": counts, "shas": shas}


class Cells:
    """Plays what is missing of each cell."""

    def __init__(self, options: argparse.Namespace, checkpoints: dict[str, Path], cells: list[Cell]) -> None:
        self._options, self._checkpoints, self.cells = options, checkpoints, cells
        self.num_of_each = -(-options.schedules // options.num_cells)
        self.kept = {cell: KeptSchedules(options.out, cell, self._settings(cell)) for cell in cells}
        self.failed: list[str] = []
        self._num_missing = sum(len(self._missing(cell)) for cell in cells)
        self._num_played, self._started_s = 0, time.monotonic()

    def _settings(self, cell: Cell) -> dict[str, Any]:
        """What results of other settings are not mixed with."""
        directory = self._options.directory
        return {
            "cell": cell.name, "weights": self._options.weights, "virtual_tp": self._options.virtual_tp,
            "checkpoint": None if directory is None else str(directory.resolve()),
        }  # fmt: skip

    def _missing(self, cell: Cell) -> list[int]:
        return [seed for seed in range(self.num_of_each) if seed not in self.kept[cell].by_seed]

    def play(self) -> None:
        """All of them, cell by cell: ranks are loaded once for each."""
        num_ranks = max(LAYOUTS[cell.layout].world_size for cell in self.cells)
        with rank_processes(num_ranks) as ranks, rank_processes(1) as lone_ranks:
            lone: tuple[tuple[str, str], LoneRuns] | None = None
            for cell in self.cells:
                if not self._missing(cell):
                    continue
                options = model_options(cell.dtype, self._options)
                place = Place(
                    ranks, self._checkpoints[cell.model], LAYOUTS[cell.layout], options, 16 << 20, kv_config()
                )
                if lone is None or lone[0] != (cell.model, cell.dtype):
                    alone = place._replace(ranks=lone_ranks, layout=ParallelLayout())
                    lone = ((cell.model, cell.dtype), LoneRuns(alone))
                self._play_cell(cell, place, lone[1])

    def _play_cell(self, cell: Cell, place: Place, lone: LoneRuns) -> None:
        vocabulary = vocabulary_of(place.checkpoint)
        started_s, before_s, num_other, seeds = time.monotonic(), _cpu_s(place.ranks), 0, self._missing(cell)
        for seed in seeds:
            try:
                found = play_schedule(seed, place, vocabulary, lone)
            except ConfigError as error:
                self.failed.append(f"{cell.name}: not played: {error}")
                print(self.failed[-1], flush=True)
                return
            except (AssertionError, RuntimeError) as error:  # not kept: it is played again
                self.failed.append(f"{cell.name}, schedule {seed}: {error}")
                print(self.failed[-1], flush=True)
                place.ranks.end()
                continue
            self.kept[cell].keep(found)
            num_other += found["num_other"]
            self._num_played += 1
            if sys.stderr.isatty():
                print(f"\r{cell.name}: {seed + 1}/{self.num_of_each}, {self._left()}   ", end="", file=sys.stderr)
        wall_s, used_s = time.monotonic() - started_s, _cpu_s(place.ranks) - before_s
        print(
            f"{cell.name}: {len(seeds)} schedules, {num_other} positions differ; {len(seeds) / wall_s:.2f} a second, "
            f"{used_s / len(seeds):.2f} s of CPU each; {self._left()}",
            flush=True,
        )

    def _left(self) -> str:
        num_left = self._num_missing - self._num_played
        left_s = (time.monotonic() - self._started_s) / max(1, self._num_played) * num_left
        return f"{num_left} left, {left_s / 60:.0f} min"


def _cpu_s(ranks: RankProcesses) -> float:
    return time.process_time() + sum(map(cpu_s, ranks.pids))


def report(kept: dict[Cell, KeptSchedules], failed: list[str], num_wanted: int) -> bool:
    """Tables and verdicts; whether all bars are met."""
    print(f"{'cell':36}{'schedules':>10}{'positions':>11}{'differ':>9}" + "".join(f"{what:>11}" for what in _COUNTED))
    shas: dict[tuple[str, str], dict[str, set[str]]] = {}
    num_schedules = num_positions = num_other = 0
    for cell, schedules in kept.items():
        found = list(schedules.by_seed.values())
        counts = sum((Counter(one["counts"]) for one in found), Counter[str]())
        positions, other = (sum(one[what] for one in found) for what in ("num_positions", "num_other"))
        row = "".join(f"{counts[what]:11,}" for what in _COUNTED)
        first = next((f"  schedule {one['seed']}: {one['first']}" for one in found if one["num_other"]), "")
        print(f"{cell.name:36}{len(found):10,}{positions:11,}{other:9,}{row}{first}")
        num_schedules, num_positions, num_other = (
            num_schedules + len(found), num_positions + positions, num_other + other,
        )  # fmt: skip
        prompts = shas.setdefault((cell.model, cell.dtype), {})
        for one in found:
            for name, sha in one["shas"].items():
                prompts.setdefault(name, set()).add(sha)
    num_split = num_prompts = 0
    for (model, dtype), prompts in shas.items():
        whole = hashlib.sha256(json.dumps({name: sorted(found) for name, found in sorted(prompts.items())}).encode())
        split = sum(len(found) > 1 for found in prompts.values())
        said = f"{len(prompts)} prompts, {split} with more than one SHA; of all {whole.hexdigest()[:16]}"
        print(f"{model} {dtype}: {said}")
        num_split, num_prompts = num_split + split, num_prompts + len(prompts)
    least = min((len(schedules.by_seed) for schedules in kept.values()), default=0)
    print("\n".join(failed))
    return all([
        verdict("schedules", f"{num_schedules:,}", f"{num_wanted:,} or more", num_schedules >= num_wanted),
        verdict("of the cell with the fewest", f"{least}", f"{LEAST_OF_A_CELL} or more", least >= LEAST_OF_A_CELL),
        verdict("positions with other bits", f"{num_other:,} of {num_positions:,}", "0", not num_other),
        verdict("prompts with more than one SHA", f"{num_split:,} of {num_prompts:,}", "0", not num_split),
        verdict("schedules that failed", f"{len(failed)}", "0", not failed),
    ])  # fmt: skip


def cells_of(options: argparse.Namespace) -> Iterator[Cell]:
    """All that --cells leaves, by model and dtype."""
    models = MODELS if options.directory is None else (options.directory.name,)
    for model in models:
        for dtype in DTYPES if options.weights == "auto" else ("bfloat16",):
            for layout in LAYOUTS:
                cell = Cell(model, dtype, layout)
                if not options.cells or any(cell.name.endswith(end) for end in options.cells):
                    yield cell


def main() -> int:
    """Play what is missing; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("--schedules", type=int, default=10_000, help="of all cells together, at least")
    parser.add_argument("--cells", nargs="+", metavar="END", help='those whose names end so, e.g. "float32 tp=2"')
    parser.add_argument("--weights", choices=("auto", "int8", "int4"), default="auto")
    parser.add_argument("--virtual-tp", default="4", help="as model.virtual_tp")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--out", type=Path, default=Path("outputs/one_bit_pattern"), help="a folder of results")
    options = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the ranks' interpreter
    cells = list(cells_of(options))
    options.num_cells = len(cells)
    part, num_parts = map(int, options.part.split("/"))
    with tempfile.TemporaryDirectory() as name:
        directory: Path | None = options.directory
        checkpoints = save_models(Path(name)) if directory is None else {directory.name: directory}
        played = Cells(options, checkpoints, cells[part - 1 :: num_parts])
        played.play()
    kept = played.kept if num_parts == 1 else Cells(options, checkpoints, cells).kept  # of the other parts too
    return 0 if report(kept, played.failed, options.schedules) else 1


if __name__ == "__main__":
    sys.exit(main())
