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
    assert page.evaluate("document.querySelectorAll('#tiles .tile').length") == 9
    assert page.evaluate("document.querySelectorAll('#curves svg').length") == 4
    assert page.evaluate("document.querySelectorAll('#ranks .stage').length") == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelector('#queue button').focus()")
    asked = page.evaluate("document.activeElement.dataset.id")
    page.press("Enter")
    page.until("document.querySelector('#story').open")
    assert page.evaluate("document.querySelector('#story-title').textContent") == asked
    assert page.evaluate("document.activeElement.textContent") == "close"
    assert page.evaluate("document.querySelector('#story').scrollTop") == 0
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


EMPTY_VIEW = {
    "num_replicas": 1, "num_stages": 1, "num_kvp_ranks": 1, "num_waiting": 0, "num_prefilling": 0, "num_decoding": 0,
    "num_blocks": 10, "num_free_blocks": [10], "queue": [], "decoding": [], "in_flight": [],
}  # fmt: skip
# What a hostile client could put wherever the page shows a text of a request.
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"


def shown(page: Page, server: Running, ttft_s: float, target_s: float) -> None:
    """Show the page data of a server with one request whose texts are all hostile; it asks for no more."""
    page.open(f"{server.url}/dashboard")
    page.until("document.querySelector('#model').textContent.includes('sim')")
    page.evaluate("document.querySelector('#pause').click()")
    data = server.get("/debug/live").json()
    recent = {
        "request_id": HOSTILE, "slo_class": HOSTILE, "num_prompt_tokens": 7, "num_scheduled_tokens": 7,
        "arrival_s": 0.0, "ttft_s": ttft_s, "target_s": target_s, "ended_s": 2.0, "outcome": HOSTILE, "num_pauses": 0,
    }  # fmt: skip
    queued = {
        "request_id": HOSTILE, "why": HOSTILE, "ahead": [HOSTILE, "cmpl-1"], "slo_class": HOSTILE,
        "num_prompt_tokens": 9, "num_scheduled_tokens": 3, "slack_s": -1.0, "relative_slack": -0.5,
    }  # fmt: skip
    data |= {"recent": [recent], "model": HOSTILE, "status": HOSTILE, "view": EMPTY_VIEW | {"queue": [queued]}}
    page.evaluate(f"show(latest = {json.dumps(data)})")


def test_no_text_of_a_request_is_markup_of_the_page(page: Page, start_server: StartServer) -> None:
    server, _ = start(start_server)
    shown(page, server, 1.0, 0.5)
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.evaluate("window.hacked === undefined")
    assert HOSTILE in page.evaluate("document.querySelector('#queue').textContent")


@pytest.mark.parametrize(
    ("ttft_s", "target_s", "said"),
    [(1.0, 0.5, "1.0 s, 500 ms late"), (0.073, 0.5, "73 ms, in time"), (12.0, 2.0, "12 s, 10 s late")],
)
def test_a_late_first_token_is_shown_with_how_late_it_was(
    page: Page, start_server: StartServer, ttft_s: float, target_s: float, said: str
) -> None:
    server, _ = start(start_server)
    shown(page, server, ttft_s, target_s)
    assert said in page.evaluate("document.querySelector('#recent').textContent")


def test_the_page_pauses_and_filters(page: Page, start_server: StartServer) -> None:
    server, _ = start(start_server)
    shown(page, server, 1.0, 0.5)
    before = page.evaluate("document.querySelector('#recent').textContent")
    for text, is_shown in (("ONERROR", True), ("nobody", False), ("", True)):
        page.evaluate(f"document.querySelector('#filter').value = '{text}'")
        page.evaluate("document.querySelector('#filter').dispatchEvent(new Event('input'))")
        assert (page.evaluate("document.querySelector('#recent').textContent") == before) is is_shown
    page.evaluate("document.querySelector('#pause').click()")
    page.until("!document.querySelector('#recent button')")


def test_metrics_are_shown_with_the_key_that_the_page_has(page: Page, start_server: StartServer) -> None:
    server, _ = start(start_server, admin_key="sk-root")
    page.open(f"{server.url}/dashboard")
    page.until("!document.querySelector('#door').hidden")
    page.evaluate("document.querySelector('#key').value = 'sk-root'")
    page.evaluate("document.querySelector('#key-form button').click()")
    page.until("document.querySelector('#door').hidden")
    page.evaluate("document.querySelector('#metrics').click()")
    page.until("document.querySelector('#story').open")
    assert "medha:num_requests_waiting" in page.evaluate("document.querySelector('#story-body').textContent")
    page.evaluate("sessionStorage.clear()")
    page.problems.clear()  # the refusal before the key was given
