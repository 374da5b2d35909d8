"""The table of clients: the page names the versions that the tool installs, and the transcripts are of those."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def clients_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients_check", ROOT / "tools" / "clients_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["clients_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pinned(package: str) -> str | None:
    found = re.search(r"(?:==|(?<=.)@)([\d.]+)$", package)
    return None if found is None else found.group(1)


def test_the_page_names_the_version_of_every_client_that_is_checked() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    for name, client in clients_check().CLIENTS.items():
        version = pinned(client.packages[0])
        assert version is not None and version in page, name


def test_transcripts_are_of_the_versions_that_are_checked() -> None:
    clients = clients_check().CLIENTS
    for path in (ROOT / "tests" / "server" / "transcripts").glob("*.json"):
        recorded = json.loads(path.read_text())
        assert recorded["version"] == pinned(clients[recorded["client"]].packages[0]), path.name
