"""The backends that run on this machine, for tests that hold for each of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one; test folders are no packages

from native_targets import TARGETS, native_of

from megatron_medha.kernels.attention.aten_attention import AtenAttention
from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.attention.native_attention import NativeAttention


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(params=TARGETS)
def native(request: pytest.FixtureRequest) -> NativeAttention:
    """The native backend for each instruction set this machine has."""
    return native_of(request.param)


@pytest.fixture(params=["aten", *TARGETS])
def make_backend(request: pytest.FixtureRequest) -> Callable[[], AttentionBackend]:
    """Makes a backend: each that runs here, in turn."""
    if request.param == "aten":
        return AtenAttention
    native_of(request.param)
    return lambda: NativeAttention(request.param)
