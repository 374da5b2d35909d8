"""Random steps over real ranks at every layout of tp x spp x kvp, each token and logit against the plain forward.

    python -m experiments.three_axes.run                            # 10,000 steps over 11 layouts
    python -m experiments.three_axes.run --steps 500 --layout "tp=2 spp=2 kvp=2"
    python -m experiments.three_axes.run --layout "tp=1 spp=1 kvp=3" --first-seed 41 --steps 1    # one walk again
    nice python -m experiments.three_axes.run --done walks.jsonl    # goes on after the walks in the file, if it exists

A walk draws chunk rules and sizes, blocks, shards (small, so that requests span every kvp rank and grow from one to
the next while they prefill and while they decode), a memory that makes decodes take the KV of others, and a mix of
requests of which some are aborted and some are faulty; the real scheduler drives ranks in processes of their own.
The model is a random Llama in fp32; the plain forward is transformers' own. A silence of 120 s is a deadlock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.lib.rank_processes import rank_processes
from experiments.three_axes.walk import LAYOUTS, RELATIVE_TOLERANCE, Outcome, random_case, save_model, walk


def walks_in(path: Path | None) -> dict[tuple[str, int], tuple[Outcome, float]]:
    """By layout and seed, what each of the file's walks has seen, and its seconds."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(one["layout"], one["seed"]): (Outcome(**one["outcome"]), one["seconds"]) for one in lines}


def note(path: Path | None, layout_name: str, seed: int, outcome: Outcome, seconds: float) -> None:
    """A walk is done."""
    if path is not None:
        with path.open("a") as file:
            one = {"layout": layout_name, "seed": seed, "seconds": seconds, "outcome": asdict(outcome)}
            file.write(json.dumps(one) + "\n")


def main() -> None:
    """Layout after layout, walk after walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="batches over all layouts (default: 10,000)")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), action="append", help="only this one; may be repeated")
    parser.add_argument("--first-seed", type=int, default=0, help="of each layout's walks (default: 0)")
    parser.add_argument("--done", type=Path, help="file of the walks that are done, a line each; none by default")
    args = parser.parse_args()
    names = args.layout or list(LAYOUTS)
    steps_each = -(-args.steps // len(names))
    total, rows = Outcome(), []
    done = walks_in(args.done)
    with tempfile.TemporaryDirectory() as name, rank_processes(max(LAYOUTS[n].world_size for n in names)) as ranks:
        checkpoint = Path(name)
        reference = save_model(checkpoint)
        with tqdm(total=args.steps, unit="step") as bar:
            for layout_name in names:
                found, seed, duration_s = Outcome(), args.first_seed, 0.0
                while found.num_batches < steps_each:
                    bar.set_postfix_str(f"{layout_name} seed {seed}")
                    if (layout_name, seed) in done:
                        outcome, seconds = done[layout_name, seed]
                        bar.update(outcome.num_batches)
                        found.add(outcome)
                        duration_s += seconds
                        seed += 1
                        continue
                    started_s = time.monotonic()
                    try:
                        outcome = walk(random_case(LAYOUTS[layout_name], seed), ranks, checkpoint, reference)
                    except AssertionError as error:
                        error.add_note(f"again: python -m {__spec__.name} --layout '{layout_name}' "
                                       f"--first-seed {seed} --steps 1")
                        raise
                    seconds = time.monotonic() - started_s
                    note(args.done, layout_name, seed, outcome, seconds)
                    bar.update(outcome.num_batches)
                    found.add(outcome)
                    duration_s += seconds
                    seed += 1
                total.add(found)
                rows.append((layout_name, seed - args.first_seed, found, duration_s))
    print(f"{'layout':<20}{'walks':>6}{'steps':>7}{'tokens':>8}{'lost KV':>8}{'shared chunks':>14}"
          f"{'streamed steps':>15}{'largest error':>15}{'seconds':>9}")
    for layout_name, num_walks, found, duration_s in rows:
        print(f"{layout_name:<20}{num_walks:>6}{found.num_batches:>7}{found.num_tokens:>8}{found.num_preempted:>8}"
              f"{found.num_shared_chunks:>14}{found.num_streamed:>15}{found.largest_error:>15.1e}{duration_s:>9.1f}")
    print(f"bar: {args.steps} steps without a deadlock, logits within {RELATIVE_TOLERANCE:.0e}, greedy tokens "
          f"identical; kept over {total.num_batches} steps and {total.num_tokens} tokens")


if __name__ == "__main__":
    main()
