"""The backends that run on this machine, for tests that hold for each of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one; test folders are no packages

from megatron_medha.kernels.attention.aten_attention import AtenAttention
from megatron_medha.kernels.attention.backend import AttentionBackend
from megatron_medha.kernels.attention.native_attention import NativeAttention
from megatron_medha.kernels.native_build import NativeUnavailable, native_target


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(params=["AVX512", "AVX2"])
def native(request: pytest.FixtureRequest) -> NativeAttention:
    """The native backend for each instruction set this machine has."""
    try:
        if request.param == "AVX512" and native_target() != "AVX512":
            pytest.skip("this machine has no AVX-512")
        return NativeAttention(request.param)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["aten", "AVX512", "AVX2"])
def make_backend(request: pytest.FixtureRequest) -> Callable[[], AttentionBackend]:
    """Makes a backend: each that runs here, in turn."""
    if request.param == "aten":
        return AtenAttention
    try:
        if request.param == "AVX512" and native_target() != "AVX512":
            pytest.skip("this machine has no AVX-512")
        NativeAttention(request.param)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    return lambda: NativeAttention(request.param)
