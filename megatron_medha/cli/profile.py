"""`medha profile`: measures a grid of steps with a checkpoint on this machine, fits the cost model, writes it down."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict

from megatron_medha.cli.parts.command_options import read_options
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.serve_options import ProfileOptions, rank_config
from megatron_medha.system.checked_files import check_writable
from megatron_medha.system.machine import num_usable_cores

USAGE = """\
usage: medha profile DIR [key=value ...]

Runs some hundred steps of the model as `medha serve` would, in under 3 minutes, and fits the cost model to them. With
profile=FILE the server starts from this fit and keeps learning; without one it needs several hundred steps first.

examples:
  medha profile checkpoints/tiny
  medha profile DIR file=h200.json model.device=cuda model.kv_dtype=fp8_e4m3
  medha serve DIR profile=profile.json
"""


def run(words: Sequence[str]) -> int:
    """Measure, fit, write, and say how well it predicts."""
    options = read_options("profile", words, USAGE, lambda: ProfileOptions)
    if options is not None:
        _profile(options)
    return 0


def _profile(options: ProfileOptions) -> None:
    from megatron_medha.worker.startup.cpu_share import set_passive_omp_wait

    set_passive_omp_wait(num_usable_cores())
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    config = rank_config(options)
    path = options.file.expanduser()
    check_writable("file", path)

    from tqdm import tqdm

    from megatron_medha.core.cost.fitted_cost import MIN_STEPS, fit
    from megatron_medha.worker.startup.load import load_rank
    from megatron_medha.worker.startup.step_grid import grid, measure

    rank, ready = load_rank(config, lambda what, fraction: None)
    points = grid(ready.num_blocks * ready.block_size, ready.shape.max_context_len)
    with tqdm(total=len(points), unit="step", desc="measuring") as bar:
        steps = measure(rank, ready, points, seconds=options.seconds, note=bar.update)
    if len(steps) < MIN_STEPS:
        raise ConfigError(
            f"seconds={options.seconds:g}: time for {len(steps)} steps only, and a fit needs {MIN_STEPS}; "
            "give more seconds"
        )
    fitted = fit(steps, shape=ready.shape, chip=ready.device, dtype=config.model.dtype)
    path.write_text(json.dumps(asdict(fitted), indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(steps)} of {len(points)} steps on {ready.device}\n"
        f"prediction error of steps held out of the fit: p50 {100 * fitted.error_p50:.1f}%, "
        f"p95 {100 * fitted.error_p95:.1f}%\n"
        f"written to {path}; medha serve checkpoint={options.checkpoint} profile={path}"
    )
