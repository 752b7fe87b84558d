"""One engine on a host: between real processes, against what others may put in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.supervision.host_lock import HostLock, host_lock_file
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from service.supervision.host_lock import HostLock
lock = HostLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has tried to take the lock, and what it was told."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_the_second_process_is_told_who_has_it_until_that_one_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "ours" / "engine.lock"
    lock = HostLock(file)
    with another_process(file) as (holder, said):
        assert said == ""
        assert lock.take() == f"another engine runs on this host: process {holder.pid} holds {file}"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock.take() == ""
    assert lock.take() == "", "it is ours already"
    with another_process(file) as (_, said):
        assert said == f"another engine runs on this host: process {os.getpid()} holds {file}"
    lock.release()
    lock.release()
    with another_process(file) as (_, said):
        assert said == ""


def test_a_holder_that_has_not_said_its_number_yet_holds_it_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "engine.lock"
    first = HostLock(file)
    assert first.take() == ""
    file.write_text("")
    assert "process unknown holds" in HostLock(file).take()
    first.release()


def test_folder_and_file_are_ours_alone_and_children_do_not_inherit_it(tmp_path: Path) -> None:
    file = tmp_path / "ours" / "engine.lock"
    lock = HostLock(file)
    assert lock.take() == ""
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    assert lock._handle is not None
    assert os.get_inheritable(lock._handle) is False
    lock.release()


@pytest.mark.parametrize("trap", ["link to a folder", "link to a file", "open folder", "a folder", "no such place"])
def test_what_somebody_put_in_its_place_is_not_used_and_stops_nothing(tmp_path: Path, trap: str) -> None:
    file = tmp_path / "ours" / "engine.lock"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    victim = elsewhere / "victim"
    victim.write_text("precious")
    match trap:
        case "link to a folder":
            file.parent.symlink_to(elsewhere)
        case "link to a file":
            file.parent.mkdir(mode=0o700)
            file.symlink_to(victim)
        case "open folder":
            file.parent.mkdir()
            file.parent.chmod(0o777)
        case "a folder":
            file.mkdir(parents=True)
        case _:
            file = tmp_path / "nowhere" / "ours" / "engine.lock"
    lock = HostLock(file)
    assert lock.take() == "", "the lock guards against mistakes; it must not keep the service down"
    assert lock._handle is None
    assert victim.read_text() == "precious"
    assert sorted(elsewhere.iterdir()) == [victim]


def test_every_state_directory_of_a_user_has_the_same_file() -> None:
    assert host_lock_file() == Path(f"/var/tmp/mlxd-{os.geteuid()}/engine.lock")
