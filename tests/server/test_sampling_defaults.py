"""generation_config.json: what requests leave out comes from it; what they say goes before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_server import Running

from megatron_medha.core.errors import CheckpointError, ConfigError
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.text.sampling_defaults import SamplingDefaults, read_sampling_defaults

QWEN = {
    "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3], "pad_token_id": 1, "repetition_penalty": 1.05,
    "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.37.0",
}  # fmt: skip
DEFAULTS = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "echo", "prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"model": "echo", "input": "hi", "max_output_tokens": 16},
}


def saved(directory: Path, content: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(content))
    return directory


def drawn(server: Running) -> SamplingDefaults:
    """How the last request's tokens are drawn."""
    sampling = server.engine.submitted[-1].sampling
    return SamplingDefaults(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_request_leaves_out_is_the_checkpoints_recommendation(
    route: str, start_server: Callable[..., Running]
) -> None:
    server = start_server(sampling_defaults=DEFAULTS)
    body = {**ROUTES[route], "model": server.get("/v1/models").json()["data"][0]["id"]}
    assert server.post(route, body).status_code == 200
    assert drawn(server) == DEFAULTS


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "stated",
    [
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 2.0},
    ],
)
def test_what_a_request_says_goes_before_it(
    route: str, stated: dict[str, float], start_server: Callable[..., Running]
) -> None:
    server = start_server(sampling_defaults=DEFAULTS)
    body = {**ROUTES[route], "model": server.get("/v1/models").json()["data"][0]["id"], **stated}
    assert server.post(route, body).status_code == 200
    assert drawn(server) == SamplingDefaults(**stated)
    assert server.post(route, {**body, "top_k": -1}).status_code == 200
    assert drawn(server).top_k == 0


def test_models_say_what_the_defaults_are(start_server: Callable[..., Running]) -> None:
    listed = start_server(sampling_defaults=DEFAULTS).get("/v1/models").json()["data"][0]["sampling_defaults"]
    assert listed == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}


def test_the_first_file_is_read(tmp_path: Path) -> None:
    assert read_sampling_defaults([tmp_path, saved(tmp_path / "a", QWEN), saved(tmp_path / "b", {})]) == DEFAULTS
    assert read_sampling_defaults([tmp_path]) == read_sampling_defaults([]) == SamplingDefaults()
    nothing = {"temperature": None, "top_k": -1, "do_sample": False, "max_new_tokens": 5}
    assert read_sampling_defaults([saved(tmp_path / "b", nothing)]) == SamplingDefaults()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1), ("temperature", "0.7"), ("temperature", True), ("temperature", float("nan")),
        ("top_p", 0), ("top_p", 1.5), ("top_k", 2.5), ("top_k", -2), ("top_k", 1e300), ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)  # fmt: skip
def test_a_value_that_no_request_might_have_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}=.*server.generation_config=none"):
        read_sampling_defaults([saved(tmp_path, {key: value})])


def test_the_option_is_auto_or_none() -> None:
    with pytest.raises(ConfigError, match=r"server\.generation_config=vllm"):
        ServerConfig(generation_config="vllm")
