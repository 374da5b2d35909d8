"""What the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_medha.core.errors import ConfigError
from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.serve_options import ServeConfig, ServeOptions, serve_config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that passes for a checkpoint until somebody reads it."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def configure(checkpoint: Path) -> Callable[..., ServeConfig]:
    """From overrides to what the server is made from; the checkpoint is given unless the overrides do."""

    def run(*overrides: str, config_dir: Path | None = None) -> ServeConfig:
        given = [text for text in overrides if text.startswith("checkpoint=")] or [f"checkpoint={checkpoint}"]
        others = [text for text in overrides if not text.startswith("checkpoint=")]
        return serve_config(freeze(compose("serve", ServeOptions, [*given, *others], config_dir), ServeOptions))

    return run


@pytest.fixture
def refusal(configure: Callable[..., ServeConfig]) -> Callable[..., str]:
    """The one line a user reads when these overrides are refused."""

    def run(*overrides: str, config_dir: Path | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            configure(*overrides, config_dir=config_dir)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run
