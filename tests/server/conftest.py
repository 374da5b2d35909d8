"""A byte tokenizer and real servers on loopback ports, for the tests of this folder."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one; test folders are no packages

from fake_engine import WAIT_S, FakeEngine
from running_server import CHAT_TEMPLATE, Running, StartServer, byte_tokenizer_backend

from megatron_medha.server.app import create_app
from megatron_medha.server.run_server import Server, bind, uvicorn_config
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.server.service import Service
from megatron_medha.text.chat.template_renders import TemplateProcessPool
from megatron_medha.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as save_pretrained writes it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer_backend().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The byte tokenizer, without a BOS of its own."""
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def ending() -> Iterator[list[Running]]:
    """Servers told to stop; all must have stopped in the end. Waiting after each test would take minutes."""
    servers: list[Running] = []
    yield servers
    for running in servers:
        running.thread.join(WAIT_S)
        assert not running.thread.is_alive()


@pytest.fixture(scope="session")
def renders() -> Iterator[TemplateProcessPool]:
    """One for all servers: each would start a process for its first chat."""
    renders = TemplateProcessPool()
    yield renders
    renders.close()


@pytest.fixture
def start_server(tokenizer: Tokenizer, ending: list[Running], renders: TemplateProcessPool) -> Iterator[StartServer]:
    """Starts servers on free ports, and stops them after the test."""
    started: list[Running] = []

    def start(
        engine: FakeEngine | None = None, tokenizer: object = tokenizer, model_name: str = "", **settings: object
    ) -> Running:
        engine = engine or FakeEngine()
        names = {"journal", "metrics", "slo", "read_config", "traces", "renders", "sampling_defaults", "isolates_keys"}
        names &= settings.keys()
        parts = {name: settings.pop(name) for name in names}
        config = ServerConfig(**{"port": 0, "drain_timeout_s": 0, **settings})
        service = Service(engine, tokenizer, config, **{"renders": renders, **parts})
        app = create_app(service, model_name)
        listener = bind(config)
        has_started = threading.Event()
        server = Server(uvicorn_config(app, config), service, has_started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert has_started.wait(WAIT_S)
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=url, timeout=WAIT_S, verify=False, trust_env=False)
        running = Running(url, port, engine, service, server, thread, client)
        started.append(running)
        return running

    yield start
    for running in started:
        running.client.close()
        running.server.should_exit = True
        ending.append(running)


@pytest.fixture
def server(start_server: StartServer) -> Running:
    """A server over an engine that echoes prompts."""
    return start_server()
