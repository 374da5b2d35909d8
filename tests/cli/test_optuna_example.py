"""experiments/optuna as its README types it, two short trials of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_medha.cli.medha import main

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'megatron_medha[sweep]'")

CONF = Path(__file__).parents[2] / "experiments" / "optuna" / "conf"


def test_the_sweeper_of_the_example_tries_budgets_margins_and_layouts(tmp_path: Path) -> None:
    words = ["--config-dir", str(CONF), "hydra/sweeper=optuna_step_budget", "hydra.sweeper.n_trials=2"]
    run = ["hardware=a100_x16", "workload.duration_s=3", "plots=never", "record.trace_duration_s=0"]
    assert main(["simulate", "-m", *words, *run, f"out={tmp_path}"]) == 0

    tried = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*/overrides.txt"))]
    assert len(tried) == 2 and tried[0] != tried[1]
    for overrides in tried:
        chosen = dict(word.split("=", 1) for word in overrides)
        assert 0.005 <= float(chosen["scheduler.step_budget_s"]) <= 0.2
        assert chosen["parallel"] in {"tp8_spp2", "tp4_spp4"}
    assert (tmp_path / "optimization_results.yaml").exists()
