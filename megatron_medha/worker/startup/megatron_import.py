"""Loading Megatron without what a rank never uses: half of the CPU time until the model is ready goes into that.

Measured with torch 2.13 and Megatron-core 0.16.1 on one core: 8.5 s of CPU time until a small model is ready with
both, 5.0 s without.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

log = logging.getLogger(__name__)


def import_megatron(device: str) -> None:
    """Import megatron.core; before anything else does."""
    if "megatron.core" in sys.modules:
        return
    # Megatron's own inference engine can log to W&B, and imports it where it is installed. Here the API server logs.
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # None: importing it is an ImportError
    if device != "cpu":
        disable_broken_transformer_engine()
        import megatron.core  # noqa: F401

        return
    # On a CPU it may not even be importable (CUDA libraries), and it takes 1.6 s where it is.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # Its fused functions go through torch.compile when they are defined, which loads Dynamo and Inductor. None of them
    # runs on a CPU, where they would be compiled for seconds at their first call (model/build.py turns them off).
    compile_ = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_


def disable_broken_transformer_engine() -> None:
    """Where Transformer Engine is installed but cannot be imported, say why; Megatron then goes without it.

    Megatron takes any that it finds for a whole one, so that `import megatron.core` itself would fail: with
    ModuleNotFoundError for one of its needs (pydantic, onnxscript), RuntimeError for the meta package alone, OSError.
    """
    name = "transformer_engine"
    if name in sys.modules or find_spec(name) is None:
        return
    try:
        importlib.import_module(f"{name}.pytorch")
    except Exception as error:  # half-installed ones raise anything
        log.warning("transformer_engine_disabled reason=%s: %s", type(error).__name__, error)
        for loaded in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """A decorator like torch.compile, with options or without, that changes nothing."""
    return function if function is not None else lambda decorated: decorated
