"""Keys of the release before: read, with a warning that names the new one; together with the new one, refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from megatron_medha.cli.reports.report_runs import find_runs
from megatron_medha.cli.run_batch import BatchOptions
from megatron_medha.cli.selftest import SelftestConfig
from megatron_medha.core.errors import ConfigError
from megatron_medha.options import renamed_keys
from megatron_medha.options.compose import Composed, compose, freeze
from megatron_medha.options.option_errors import type_at
from megatron_medha.options.renamed_keys import FIXED_KEYS, RENAMED_KEYS, current_values
from megatron_medha.options.serve_options import ServeOptions

COMMANDS: dict[str, tuple[str, type]] = {
    "max_attempts": ("run_batch", BatchOptions),
    "shutdown_server": ("selftest", SelftestConfig),
    "slow_tests": ("selftest", SelftestConfig),
}
VALUES = {bool: "true", int: "7", float: "7.5", str: "hermes"}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    renamed_keys._warn.cache_clear()


def composed(new: str, *words: str) -> Composed:
    name, config_class = COMMANDS.get(new, ("serve", ServeOptions))
    return compose(name, config_class, words)


def value_at(found: Composed, key: str) -> object:
    value = found.values
    for part in key.split("."):
        value = value[part]
    return value


def a_value_for(new: str) -> str:
    return VALUES[type_at(COMMANDS.get(new, ("serve", ServeOptions))[1], new)]


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_read_and_warned_of_once(old: str, new: str, caplog: pytest.LogCaptureFixture) -> None:
    value = a_value_for(new)
    for prefix in ("", "++"):
        found = composed(new, f"{prefix}{old}={value}")
        assert value_at(found, new) == yaml.safe_load(value)
    assert caplog.messages == [f"{old} is now {new}; the old name will be refused in the next release"]


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_beside_the_new_one_is_refused(old: str, new: str) -> None:
    value = a_value_for(new)
    for words in ((f"{old}={value}", f"{new}={value}"), (f"{new}={value}", f"{old}={value}")):
        with pytest.raises(ConfigError, match=f"an old and a new name of one key; give {new} alone"):
            composed(new, *words)


@pytest.mark.parametrize(("key", "constant"), FIXED_KEYS.items())
def test_a_key_that_is_none_any_more_is_said_to_be_a_constant(
    key: str, constant: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert composed("", f"{key}={constant if constant is not None else 3}") == composed("")
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"{key} is no option any more")
    if constant is not None:
        with pytest.raises(ConfigError, match=f"{key}=77: {key} is no option any more, it is always {constant:g}"):
            composed("", f"{key}=77")


def test_an_option_file_of_the_users_may_have_old_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "server" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("defaults:\n  - local\n\nrefuses_late: true\nmax_n: 128\n")
    words = ["checkpoint=x", "server=mine"]
    assert freeze(compose("serve", ServeOptions, words, tmp_path), ServeOptions).server.reject_late
    assert [message.split(" ")[0] for message in caplog.messages] == ["server.refuses_late", "server.max_n"]
    mine.write_text("refuses_late: true\nreject_late: false\n")
    with pytest.raises(ConfigError, match=r"server.refuses_late \(in server/mine.yaml\): an old name of server.reject"):
        compose("serve", ServeOptions, words, tmp_path)
    mine.write_text("max_n: 3\n")
    with pytest.raises(ConfigError, match=r"server.max_n=3 \(in server/mine.yaml\): server.max_n is no option"):
        compose("serve", ServeOptions, words, tmp_path)


def test_a_run_of_the_release_before_is_compared_by_the_new_names(tmp_path: Path) -> None:
    for name, key in (("old", "max_saved_gift_steps"), ("new", "max_banked_steps")):
        run = tmp_path / name
        run.mkdir()
        (run / "summary.json").write_text('{"all": {}, "classes": {}}')
        (run / "config.yaml").write_text(f"scheduler:\n  {key}: 2.0\n")
    old, new = find_runs([tmp_path / "old", tmp_path / "new"])
    assert old.options == new.options == {"scheduler.max_banked_steps": 2.0}


def test_what_was_written_down_is_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    written = {"server": {"refuses_late": True, "max_n": 3, "port": 1}, "max_tries": 4}
    assert current_values(written) == {"server": {"reject_late": True, "port": 1}, "max_attempts": 4}
    assert not caplog.messages
