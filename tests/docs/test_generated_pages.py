"""Pages and pictures that are made from files are what those files say now; the front page stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_medha
from tools.benchmarks_page import benchmarks_page
from tools.flags_table import PAGE, with_table
from tools.peers_picture import p99_by_server, picture

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "README.md"]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_figures_are_those_of_the_results_files() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == benchmarks_page(), "run python tools/benchmarks_page.py > docs/benchmarks.md"


def test_the_flags_are_those_of_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run python tools/flags_table.py"


def test_the_picture_shows_the_measured_values() -> None:
    assert (ROOT / "docs" / "peers.svg").read_text(encoding="utf-8") == picture(), "run python tools/peers_picture.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = p99_by_server()["medha"]
    assert f"{min(ours):.2f} to {max(ours):.2f} s" in readme


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_script_module_or_make_target_that_a_page_runs_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = set(re.findall(r"python (tools/[\w/]+\.py)", text))
    modules = set(re.findall(r"python -m ((?:experiments|tools)(?:\.\w+)+)", text))
    places = scripts | {f"{module.replace('.', '/')}.py" for module in modules}
    assert not [place for place in sorted(places) if not (ROOT / place).is_file()]
    targets = set(re.findall(r"(?:^    |`)make ([a-z][\w-]*)", text, re.MULTILINE))
    assert targets <= MAKE_TARGETS


def test_links_of_the_pages_beside_the_readme_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_anchors_lead_to_headings() -> None:
    broken = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]+\.md)#([\w-]+)\)", page.read_text(encoding="utf-8")):
            headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                broken.append(f"{page.name}: {target}#{anchor}")
    assert not broken, "\n".join(broken)


def test_the_changelog_knows_the_version() -> None:
    assert f"## {megatron_medha.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
