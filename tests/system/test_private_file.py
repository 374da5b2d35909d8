"""Key files: whose they may be, and who may read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_medha.core.errors import ConfigError
from megatron_medha.system.checked_files import check_private

OTHER_USER = 12345


def key_file(directory: Path, mode: int, owner: int | None = None) -> Path:
    """A file of keys; the test is skipped where it may not be given away."""
    path = directory / "keys"
    path.write_text("alice sk-alice\n")
    path.chmod(mode)
    if owner is not None and owner != os.geteuid():
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, owner, -1)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_for_its_owner_alone_is_taken(tmp_path: Path, mode: int) -> None:
    check_private(key_file(tmp_path, mode), "server.api_key_file")


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o620, 0o602, 0o777])
def test_a_file_that_others_can_read_or_change_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode)
    with pytest.raises(ConfigError, match=rf"server\.api_key_file=.*{mode:04o}.*chmod 600 {path}"):
        check_private(path, "server.api_key_file")


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, 0o600, OTHER_USER)
    with pytest.raises(ConfigError, match=rf"belongs to user {OTHER_USER}.*chown"):
        check_private(path, "server.api_key_file")


def test_a_group_may_read_what_belongs_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path, 0o440, 0)
    check_private(path, "server.api_key_file")  # fsGroup of a pod
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)
        check_private(path, "server.api_key_file")
        os.chown(path, OTHER_USER, -1)
        with pytest.raises(ConfigError, match="read by others"):
            check_private(path, "server.api_key_file")


def test_the_files_of_a_pods_secrets_are_taken_as_they_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    real = key_file(tmp_path / "..2026", 0o644)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "keys").symlink_to("..data/keys")
    check_private(tmp_path / "keys", "server.api_key_file")
    real.chmod(0o646)
    with pytest.raises(ConfigError, match="changed by others"):
        check_private(tmp_path / "keys", "server.api_key_file")


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(key_file(tmp_path, 0o644))
    with pytest.raises(ConfigError, match="0644"):
        check_private(tmp_path / "link", "server.tls_key")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="No such file"):
        check_private(tmp_path / "nowhere", "server.tls_key")
