"""Secrets in files: whole or absent, ours alone, and never somebody else's link."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from service.settings import ConfigurationError, read_private, write_private


def test_what_is_written_is_0600_in_a_0700_folder_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secret"
    previous = os.umask(0)
    try:
        write_private(path, b"first", replace=False)
    finally:
        os.umask(previous)
    assert read_private(path) == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["secret"]


def test_without_replace_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_private(path, b"second", replace=False)
    assert (read_private(path), [each.name for each in tmp_path.iterdir()]) == (b"first", ["secret"])
    write_private(path, b"second", replace=True)
    assert (read_private(path), [each.name for each in tmp_path.iterdir()]) == (b"second", ["secret"])


def test_of_racing_writers_one_wins_and_no_reader_sees_half_a_file(tmp_path: Path) -> None:
    path, start, outcomes = tmp_path / "secret", threading.Barrier(8), []

    def write(number: int) -> None:
        start.wait()
        try:
            write_private(path, bytes([number]) * 10_000, replace=False)
            outcomes.append(number)
        except FileExistsError:
            assert len(set(read_private(path))) == 1
            assert path.stat().st_size == 10_000

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert read_private(path) == bytes(outcomes) * 10_000


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o601])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="others may read; chmod 600"):
        read_private(path)


def test_a_link_a_pipe_a_folder_and_a_file_too_large_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_private(target, b"x" * 100, replace=False)
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="link: cannot be read"):
        read_private(tmp_path / "link")
    for name in ("pipe", "folder"):
        with pytest.raises(ConfigurationError, match=f"{name}: "):
            read_private(tmp_path / name)
    with pytest.raises(ConfigurationError, match="at most 99 bytes"):
        read_private(target, limit=99)
    assert read_private(target, limit=100) == b"x" * 100


def test_somebody_elses_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    write_private(path, b"x", replace=False)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigurationError, match="must belong to the user"):
        read_private(path)


def test_a_file_that_is_not_there_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_private(tmp_path / "secret")


def test_a_full_disk_leaves_what_was_there_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    write_private(path, b"first", replace=False)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="secret: cannot be written: No space left"):
        write_private(path, b"second", replace=True)
    assert (read_private(path), [each.name for each in tmp_path.iterdir()]) == (b"first", ["secret"])


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_private(tmp_path / "file" / "secret", b"x", replace=True)
