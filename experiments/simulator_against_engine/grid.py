"""Times of a fixed grid of steps on the loaded rank, and the law fitted to them: what nobody's decisions are in.

    python -m experiments.simulator_against_engine.grid CHECKPOINT GRID.json --seconds 40 [override ...]

As `medha profile` does it, over the chunks and contexts that this experiment's prompts have.
"""

from __future__ import annotations

import argparse
import random
from itertools import product
from pathlib import Path

import msgspec
from tqdm import tqdm

from experiments.simulator_against_engine.log import Grid

CHUNKS = (0, 8, 16, 32, 48, 64, 96, 128)
CONTEXTS = (0, 256, 1024, 3000)
DECODES = (0, 1, 2, 4)
DECODE_CONTEXT = 400


def main() -> None:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("grid", type=Path, help="where steps and fit are written")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("overrides", nargs="*", help="options of medha profile, as key=value")
    arguments = parser.parse_args()
    from megatron_medha.core.cost.fitted_cost import fit
    from megatron_medha.options.compose import compose, freeze
    from megatron_medha.options.serve_options import ProfileOptions, rank_config
    from megatron_medha.worker.startup.load import load_rank
    from megatron_medha.worker.startup.step_grid import GridPoint, measure

    words = [f"checkpoint={arguments.checkpoint}", *arguments.overrides]
    config = rank_config(freeze(compose("profile", ProfileOptions, words), ProfileOptions))
    rank, ready = load_rank(config, lambda what, fraction: None)
    points = [
        GridPoint(chunk, context, num_decodes, DECODE_CONTEXT)
        for chunk, context, num_decodes in product(CHUNKS, CONTEXTS, DECODES)
        if (chunk or num_decodes) and (chunk or not context)
    ]
    random.Random(0).shuffle(points)  # a drift must not look like a law
    with tqdm(total=len(points), unit="step", desc="grid", leave=False) as bar:
        steps = measure(rank, ready, points, seconds=arguments.seconds, note=bar.update)
    law = fit(steps, shape=ready.shape, chip=ready.device, dtype=config.model.dtype)
    arguments.grid.write_bytes(msgspec.json.encode(Grid(law=law, steps=tuple(steps))))


if __name__ == "__main__":
    main()
