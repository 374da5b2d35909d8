"""Loading Megatron without what a rank never uses: half of the CPU time until the model is ready goes into that.

Measured with torch 2.13 and Megatron-core 0.16.1 on one core: 8.5 s of CPU time until a small model is ready with
both, 5.0 s without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def import_megatron(device: str) -> None:
    """Import megatron.core; before anything else does."""
    if "megatron.core" in sys.modules:
        return
    # Megatron's own inference engine can log to W&B, and imports it where it is installed. Here the front logs.
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # None: importing it is an ImportError
    if device != "cpu":
        import megatron.core  # noqa: F401

        return
    # Its fused functions go through torch.compile when they are defined, which loads Dynamo and Inductor. None of them
    # runs on a CPU, where they would be compiled for seconds at their first call (model/build.py turns them off).
    compile_ = torch.compile
    torch.compile = _as_it_is
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """A decorator like torch.compile, with options or without, that changes nothing."""
    return function if function is not None else lambda decorated: decorated
