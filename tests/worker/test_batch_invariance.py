"""What model.batch_invariant sets, and what it says of what cannot be had."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from megatron_medha.core.errors import ConfigError
from megatron_medha.kernels.attention.aten_attention import AtenAttention
from megatron_medha.worker.startup.batch_invariance import make_batch_invariant


def test_a_backend_that_cuts_by_its_load_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="attention_backend=aten cuts keys .* use attention_backend=triton"):
        make_batch_invariant(AtenAttention())


def test_parts_that_are_no_multiple_of_a_tile_are_refused_with_the_key() -> None:
    backend = AtenAttention()
    backend.has_fixed_splits, backend.partition_tokens = True, 80
    with pytest.raises(ConfigError, match="kv.partition_tokens=80: on a GPU it must be a multiple of 128"):
        make_batch_invariant(backend)


@pytest.mark.parametrize("is_there", [False, True])
def test_the_log_says_whether_linear_layers_are_invariant_too(
    is_there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enabled: list[bool] = []
    package = SimpleNamespace(enable_batch_invariant_mode=lambda: enabled.append(True)) if is_there else None
    monkeypatch.setitem(sys.modules, "batch_invariant_ops", package)
    backend = AtenAttention()
    backend.has_fixed_splits = True
    with caplog.at_level(logging.INFO):
        make_batch_invariant(backend)
    assert backend.fixed_split_tokens == 1024
    assert enabled == [True] * is_there
    assert f"batch_invariant_linear_layers={str(is_there).lower()}" in caplog.text
