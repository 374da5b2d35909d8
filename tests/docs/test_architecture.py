"""The page about the architecture names files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_floors import ROOMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PATHS = sorted(
    path
    for path in set(re.findall(r"`([\w./]+/[\w.]+\.(?:py|cpp|yaml|md))`", PAGE))
    if "NAME" not in path
)


def found(path: str) -> Path:
    """Where the page's path leads: in the working copy, or in the package."""
    return next((place for place in (ROOT / path, ROOT / "megatron_medha" / path) if place.exists()), ROOT / path)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_the_page_names_exists(path: str) -> None:
    assert found(path).is_file()


@pytest.mark.parametrize(("path", "name"), sorted(set(re.findall(r"`([\w./]+\.py)`: `([\w.]+)`", PAGE))))
def test_a_function_that_the_page_names_is_in_its_file(path: str, name: str) -> None:
    source = found(path).read_text(encoding="utf-8")
    *owner, function = name.split(".")
    assert re.search(rf"^ *(async )?def {function}\(", source, re.MULTILINE)
    assert not owner or re.search(rf"^ *class {owner[0]}\b", source, re.MULTILINE)


def test_every_package_has_a_row() -> None:
    named = set(re.findall(r"^\| `([\w/]+)` \|", PAGE, re.MULTILINE))
    assert named >= {room for room in ROOMS if "/" not in room}
