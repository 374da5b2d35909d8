"""Figures as text."""

from __future__ import annotations

import pytest

from megatron_medha.stats.text_table import percent_text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "-"), (-1e-9, "0.0%"), (0.0004, "0.0%"), (0.99951, "100.0%"), (-0.012, "-1.2%")]
)
def test_a_share_that_rounds_to_nothing_has_no_sign(share: float | None, text: str) -> None:
    assert percent_text(share) == text
