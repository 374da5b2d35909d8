"""Installations of Transformer Engine that cannot be imported do not keep a rank from loading Megatron."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest

from megatron_medha.worker.startup.megatron_import import disable_broken_transformer_engine


@pytest.mark.parametrize("fault", ["raise RuntimeError('empty meta package')", "import no_such_package_for_medha"])
def test_a_transformer_engine_that_cannot_be_imported_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch" / "__init__.py").write_text(fault)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # whatever is there comes back after the test
    del sys.modules["transformer_engine"]
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        disable_broken_transformer_engine()
    assert "transformer_engine_disabled" in caplog.text
    assert not [name for name in sys.modules if name.startswith("transformer_engine.")]
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
