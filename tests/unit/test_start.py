"""This start: judged by the ledger, told to the ledger, and in safe mode with less."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from service.errors import NotEnoughMemory
from service.observability.process import boot_time, is_running
from service.settings import Settings
from service.supervision import start as module
from service.supervision.host_lock import HostLock
from service.supervision.policy import Verdict
from service.supervision.start import Start, prepare
from service.supervision.starts import StartLedger, StartRecord


def settings(state_dir: Path, **more: object) -> Settings:
    state_dir.chmod(0o700)
    return Settings.load(None, {"server.state_dir": state_dir, "supervised.host_lock": "off", **more})


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def one(ledger: StartLedger) -> StartRecord:
    [record] = ledger.read().starts
    return record


def test_a_start_is_in_the_ledger_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    ledger = StartLedger(tmp_path)
    start = prepare(settings(tmp_path), supervised=True)
    assert not ledger.file.exists(), "it has not begun"
    start.begin()
    began = one(ledger)
    assert (began.pid, began.ready, began.exit_code) == (os.getpid(), None, None)
    start.ready()
    assert one(ledger).ready is not None
    assert start.end(0) == 0
    assert one(ledger).exit_code == 0
    assert one(ledger).ended is not None
    assert ledger.read().down_because == "", "it was stopped"


@pytest.mark.parametrize(
    ("code", "becomes"), [(0, 0), (os.EX_UNAVAILABLE, 0), (os.EX_SOFTWARE, os.EX_SOFTWARE), (143, 143)]
)
def test_what_another_start_cannot_help_ends_with_0_under_a_supervisor_only(
    tmp_path: Path, code: int, becomes: int
) -> None:
    start = prepare(settings(tmp_path), supervised=True)
    start.begin()
    assert start.end(code, "why") == becomes
    record = one(StartLedger(tmp_path))
    assert (record.exit_code, record.reason) == (becomes, "why")
    shell = prepare(settings(tmp_path), supervised=False)
    shell.begin()
    shell.ready()
    assert shell.end(code, "why") == code
    assert one(StartLedger(tmp_path)) == record, "a shell's start is nobody's business"


def test_an_end_on_the_spot_is_told_first(tmp_path: Path) -> None:
    start = prepare(settings(tmp_path), supervised=True)
    start.begin()
    seen: list[tuple[int, int | None]] = []
    start.leaving(lambda code: seen.append((code, one(StartLedger(tmp_path)).exit_code)))(143)
    assert seen == [(143, 143)]


def test_a_disk_that_hangs_does_not_keep_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORD_TIMEOUT", 0.05)
    start = prepare(settings(tmp_path), supervised=True)
    start.begin()
    release = threading.Event()
    monkeypatch.setattr(StartLedger, "put", lambda *_: release.wait(10))
    assert start.end(70) == 70
    release.set()


def test_starts_that_died_make_it_wait_and_serve_with_less(tmp_path: Path, gone: int) -> None:
    ledger = StartLedger(tmp_path)
    for ago in (30, 20, 10):
        ledger.put(StartRecord(began=time.time() - ago, pid=gone, ready=time.time() - ago + 1))
    start = prepare(settings(tmp_path, **{"engine.memory_budget_share": 0.8}), supervised=True)
    assert start.verdict.safe_mode == "3 starts died within an hour"
    assert (start.settings.engine.max_rows, start.settings.engine.memory_budget_share) == (1, 0.4)
    assert start.attempts().delay == 4
    start.begin()
    assert ledger.read().starts[-1].safe_mode == "3 starts died within an hour"
    shell = prepare(settings(tmp_path), supervised=False)
    assert (shell.verdict, shell.settings.engine.max_rows) == (Verdict(), 32)


def test_a_start_that_still_runs_has_not_died(tmp_path: Path, gone: int) -> None:
    ledger = StartLedger(tmp_path)
    ledger.put(StartRecord(began=time.time(), pid=os.getpid()))
    assert prepare(settings(tmp_path), supervised=True).verdict == Verdict()
    ledger.put(StartRecord(began=time.time(), pid=gone))
    assert prepare(settings(tmp_path), supervised=True).verdict.delay == 1


def test_a_machine_that_came_up_since_the_last_start_went_down_under_it(tmp_path: Path, gone: int) -> None:
    StartLedger(tmp_path).put(StartRecord(began=boot_time() - 60, pid=gone, ready=boot_time() - 30))
    verdict = prepare(settings(tmp_path), supervised=True).verdict
    assert verdict.safe_mode == "the machine went down while the service ran"


def test_a_number_that_was_given_away_anew_is_another_process(gone: int) -> None:
    assert is_running(os.getpid(), time.time())
    assert not is_running(os.getpid(), boot_time())
    assert not is_running(gone, time.time())
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(zombie.pid, time.time())
    zombie.wait()


@pytest.mark.parametrize(
    ("setting", "supervised", "locks"),
    [("auto", True, True), ("auto", False, False), ("off", True, False), ("FILE", True, True), ("FILE", False, True)],
)
def test_who_takes_the_host_lock(tmp_path: Path, setting: str, supervised: bool, locks: bool) -> None:
    chosen = settings(tmp_path, **{"supervised.host_lock": setting.replace("FILE", f"{tmp_path}/lock/file")})
    start = Start(chosen, StartLedger(tmp_path) if supervised else None)
    assert (start.lock is not None) is locks
    assert len(start.attempts(lambda: "").needs) == 1 + locks


def test_a_shell_whose_lock_is_another_engines_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "lock" / "file"
    other = HostLock(file)
    assert other.take() == ""
    start = Start(settings(tmp_path, **{"supervised.host_lock": str(file)}))
    attempts = start.attempts()
    assert attempts.patience == 0
    with pytest.raises(Exception, match=f"process {os.getpid()} holds"):
        attempts.run(lambda: None, tell=lambda _: None, pause=lambda _: None)
    other.release()


def test_too_little_memory_is_refused_under_a_supervisor_and_told_in_a_shell(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughMemory):
        prepare(settings(tmp_path), supervised=True).room(2**60)
    prepare(settings(tmp_path), supervised=False).room(2**60)
