"""What an experiment's results follow from, as one number: the simulator, its options, the experiment's own code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from experiments.paper.schedule import Task

_SIMULATOR = (
    "megatron_medha/core/**/*.py", "megatron_medha/sim/**/*.py", "megatron_medha/stats/**/*.py",
    "megatron_medha/workload/**/*.py", "megatron_medha/engine/scheduler_setup.py", "conf/simulate.yaml",
    "conf/*/*.yaml", "experiments/lib/paper.py", "experiments/lib/prefill.py", "experiments/lib/options.py",
)  # fmt: skip


def fingerprint(root: Path, task: Task) -> str:
    """Of the sources as they are on disk."""
    patterns = (*_SIMULATOR, *(f"experiments/{name}/*.py" for name in (task.name, *task.needs)))
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
