"""Keys among the options: never shown, wherever options are."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_medha.cli.medha import main
from megatron_medha.cli.parts.serve_parts import public_options
from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import as_yaml, compose, freeze
from megatron_medha.options.serve_options import ServeOptions
from megatron_medha.server.server_config import ServerConfig
from megatron_medha.system.secret_values import HIDDEN, hide_secrets, is_secret_name, without_secrets

KEY, ADMIN_KEY = "sk-very-secret-1", "sk-very-secret-2"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment, where server=public looks for them."""
    monkeypatch.setenv("MEDHA_API_KEY", KEY)
    monkeypatch.setenv("MEDHA_ADMIN_KEY", ADMIN_KEY)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    "words",
    [
        ("serve", "checkpoint=x", "server=public"), ("serve", "checkpoint=x", f"server.api_key={KEY}"),
        ("chat",), ("bench",), ("selftest",), ("run-batch", "in.jsonl", "out.jsonl"),
        ("bench", f"serve='checkpoint=x server.api_key={KEY} server.admin_key=\"{ADMIN_KEY}\"'"),
        ("serve", "checkpoint=x", "server.api_key=${oc.env:NOTHING," + KEY + "}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [("--cfg", "job", "--resolve"), ("--cfg", "job")])
def test_the_composed_configuration_is_shown_without_keys(
    words: tuple[str, ...], flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *flags]) == 0
    shown = capsys.readouterr().out
    assert "very-secret" not in shown and "_key: " in shown


def test_what_names_a_variable_or_is_null_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "checkpoint=x", "server=public", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert "api_key: ${oc.env:MEDHA_API_KEY}" in out and "admin_key: ${oc.env:MEDHA_ADMIN_KEY,null}" in out
    assert main(["serve", "checkpoint=x", "--cfg", "job"]) == 0
    assert "api_key: null" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        (f"server.api_key={KEY} with a space",), (f"server.api_keyy={KEY}",), (f"+server.api_keyy={KEY}",),
        (f"api_key={KEY}",), (f"--api-key={KEY}",), ("--api-key", KEY), (f"server.api_key=[{KEY}]",),
        (f"server.api_key={KEY},b",), (f"~server.api_key={KEY}",), (f"server.api_key={KEY}", "server.nothing=3"),
        (f"server.apikey={KEY}",), (f"server.admin_key='{KEY}' x",), (f"server.api_key={{a:{KEY}}}",),
        (f"server={{api_key: {KEY}}}",), (f'server={{"api_key": "{KEY}"}}',),
        (f"server.password={KEY}",), (f"server.api_key={KEY}", "scheduler=none_of_these"),
    ],
)  # fmt: skip
def test_no_error_shows_a_key(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "checkpoint=x", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("medha serve: ") and "very-secret" not in error


def test_an_error_over_a_value_of_the_environment_does_not_show_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHA_API_KEY", f"{KEY} ä")
    assert main(["serve", "checkpoint=x", "server=public"]) == 2
    assert "very-secret" not in capsys.readouterr().err


def test_a_bench_that_starts_its_server_shows_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"serve='checkpoint=x server.api_key={KEY} server.port=3'"]) == 2
    assert "very-secret" not in capsys.readouterr().err


@pytest.mark.usefixtures("keys")
def test_what_is_kept_of_a_server_has_no_keys() -> None:
    composed = compose("serve", ServeOptions, ["checkpoint=x", "server=public"])
    assert freeze(composed, ServeOptions).server.api_key == KEY
    kept = [public_options(freeze(composed, ServeOptions)), as_yaml(composed, resolves=True)]
    assert "very-secret" not in str(kept)


def test_what_is_shown_instead_of_a_key_is_no_key() -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        ServerConfig(api_key=HIDDEN)


def test_values_that_are_no_secrets_stay(tmp_path: Path) -> None:
    values = {
        "tls_key": "/etc/key.pem", "api_key_file": "/etc/keys", "max_live_requests_per_key": 3, "key_file": "medha.key",
        "max_batch_tokens": 4, "tokenizer": "x", "a": [{"b": "c=d server.port=3"}], "api_key": None,
    }  # fmt: skip
    assert without_secrets(values) == values
    assert not any(is_secret_name(f"server.{name}") for name in values if name != "api_key")
    text = "server.tls_key=/x server.port=3: no; write server.api_key=VALUE"
    assert hide_secrets(text, ["server.tls_key=/x", "server.port=3"]) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("server.api_key=abc", f"server.api_key={HIDDEN}"),
        ("x api_key=abc: no", f"x api_key={HIDDEN}: no"),
        ('serve="a=b api_key=abc admin_key=d" e', f'serve="a=b api_key={HIDDEN} admin_key={HIDDEN}" e'),
        ("api_key=${oc.env:A} admin_key=${oc.env:A,null}", "api_key=${oc.env:A} admin_key=${oc.env:A,null}"),
        ("api_key=${oc.env:A,abc}", f"api_key={HIDDEN}"),
        ("server={port: 3, api_key: abc}: no", f"server={{port: 3, api_key: {HIDDEN}}}: no"),
        ("""{"api_key": "abc", 'admin_key':d}""", f"""{{"api_key": {HIDDEN}, 'admin_key':{HIDDEN}}}"""),
        ("server.api_key: not of the form key=value",) * 2,
        ("server={}: no, server.api_key: given before", "server={}: no, server.api_key: given before"),
    ],
)
def test_assignments_are_hidden_wherever_they_stand(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert hide_secrets(hide_secrets(text)) == shown
