"""The page of models: what its tool prints now."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
from tools.models_page import models_page  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_of_models_is_what_its_tool_prints_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == models_page(), "run python tools/models_page.py > docs/models.md"
