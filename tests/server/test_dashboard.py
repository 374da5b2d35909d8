"""The live page in a real browser: what it shows, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser_page, find_browser
from live_server import LiveEngine
from running_server import Running, StartServer

import megatron_medha.server

PAGE = Path(megatron_medha.server.__path__[0]) / "observe" / "dashboard.html"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium installed; `apt install chromium` lets this run")
    with browser_page(command) as page:
        yield page


def start(start_server: StartServer, **settings: object) -> tuple[Running, LiveEngine]:
    # One that decodes is at it for eighty seconds, unless it is let go.
    engine = LiveEngine(num_blocks=220, policy="fcfs", step_s=0.1, max_batch_tokens=1024)
    server = start_server(engine, journal=engine.journal, metrics=engine.journal.metrics, **settings)
    while server.get("/ready").status_code != 200:
        time.sleep(0.001)  # the engine's thread starts; nothing tells
    return server, engine


def busy(server: Running, engine: LiveEngine) -> list:
    """One that decodes and one that waits for its memory."""
    body = {"max_tokens": 800, "ignore_eos": True, "stream": True}
    connections = [server.connect("/v1/completions", json.dumps({"prompt": [1] * 2600, **body}).encode())]
    engine.audit.wait_for(lambda scheduler: scheduler.memory.num_free_blocks < 60)
    connections.append(server.connect("/v1/completions", json.dumps({"prompt": [2] * 2000, **body}).encode()))
    engine.audit.wait_for(lambda scheduler: scheduler.num_sequences == 2)
    return connections


def test_the_page_asks_nobody_else_for_anything() -> None:
    text = PAGE.read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'`)]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script\s+src)", text) and "innerHTML" not in text


@pytest.mark.parametrize("width", [1200, 390])
def test_the_queue_is_shown_and_a_story_opens_and_closes_by_keyboard(
    page: Page, start_server: StartServer, width: int
) -> None:
    server, engine = start(start_server)
    connections = busy(server, engine)
    page.open(f"{server.url}/dashboard", width, 844, is_phone=width < 600)
    page.until("document.querySelectorAll('#queue button').length === 1")
    assert "not enough free KV memory" in page.evaluate("document.querySelector('#queue').textContent")
    assert page.evaluate("document.querySelector('#status').textContent") == "ready"
    assert page.evaluate("document.querySelectorAll('#tiles .tile').length") == 8
    assert page.evaluate("document.querySelectorAll('#ranks .stage').length") == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelector('#queue button').focus()")
    asked = page.evaluate("document.activeElement.dataset.id")
    page.press("Enter")
    page.until("document.querySelector('#story').open")
    assert page.evaluate("document.querySelector('#story-title').textContent") == asked
    assert "waited" in page.evaluate("document.querySelector('#story-body').textContent")
    assert page.evaluate("document.querySelector('#story-body svg polyline') !== null")
    page.press("Escape")
    page.until("!document.querySelector('#story').open")
    for connection in connections:
        connection.close()
    engine.wait_until_idle()
    page.until("document.querySelectorAll('#queue button').length === 0")
    assert page.problems == []


def test_a_server_with_keys_shows_nothing_before_the_admin_key_is_given(page: Page, start_server: StartServer) -> None:
    server, _ = start(start_server, api_key="sk-user", admin_key="sk-root")
    page.open(f"{server.url}/dashboard")
    page.until("!document.querySelector('#door').hidden")
    assert page.evaluate("document.querySelector('#model').textContent") == ""
    for key, is_right in (("sk-user", False), ("sk-root", True)):
        page.evaluate(f"document.querySelector('#key').value = '{key}'")
        page.evaluate("document.querySelector('#key-form button').click()")
        if is_right:
            page.until("document.querySelector('#model').textContent.includes('sim')")
            page.until("document.querySelector('#door').hidden")
        else:
            page.until("document.querySelector('#key-why').textContent.includes('admin key')")
    page.problems.clear()  # the refusals
