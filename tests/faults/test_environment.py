"""What the machine does to a running service: its disk, its clock, its database. Real processes, a tiny model.

Of each fault: requests for generation go on, what must be written fails with a typed error in bounded time, nothing
hangs, and when the fault is over everything works again without a restart and the ledger has every request. What
stalls the log is in test_logs.py; docs/reliability.md has the table.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from service.auth.api_keys import IssuedKey
from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from service.storage.schema import USAGE
from tests.serving import Running, bearer, make_key, started

LONGEST = 10.0
"""Seconds for any answer: nothing hangs. A write waits 2 s for a lock, and reads do not wait."""


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what must come to be; asks the service, so it cannot spin."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends


@dataclass
class Subject:
    """The service under a fault, and what was asked of it. `served` counts whole answers, `written` new keys."""

    running: Running
    state: Path
    admin: httpx.Client
    user: httpx.Client
    served: int = 0
    written: int = 0

    def serves(self, times: int = 5) -> None:
        """Generation, whole and streamed, and everything that only reads."""
        for number in range(times):
            body = {"prompt": f"number {number}", "max_tokens": 8, "temperature": 0, "stream": number % 2 == 1}
            answer = self.user.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.text
            self.served += 1
        assert self.user.get("/v1/models").status_code == 200
        assert self.user.get("/health").status_code == 200
        assert self.admin.get("/admin/status").status_code == 200

    def write(self) -> tuple[int, str]:
        """Make a key: the status and the error's code. Every such call is audited in the same transaction."""
        answer = self.admin.post("/admin/keys", json={"name": "new", "scopes": ["models"]})
        if answer.status_code == 201:
            self.written += 1
            return 201, ""
        assert float(answer.headers["retry-after"]) >= 1
        return answer.status_code, answer.json()["error"]["code"]

    def writes(self) -> bool:
        return self.write()[0] == 201

    def metric(self, name: str) -> float:
        lines = self.admin.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def caught_up(self) -> bool:
        return self.metric("mlxd_usage_rows_pending ") == 0


def start(state: Path, model: Path, **overrides: str) -> AbstractContextManager[Running]:
    """`mlxd serve`, away from the checkout and its configuration."""
    outside = {"MLXD_MODEL__REFERENCE": str(model), "MLXD_AUTH__ENABLED": "true", "MLXD_ENGINE__MAX_ROWS": "2"}
    return started(state, timed=True, folder=str(state.parent), **outside, **overrides)


@contextmanager
def subject(state: Path, model: Path, **overrides: str) -> Iterator[Subject]:
    """A service with its state in that folder; when the block ends, its books are checked and it drains."""
    settings = Settings.load(None, {"server.state_dir": state})
    admin = make_key(settings, "admin", "metrics", "models", name="admin")
    user = make_key(settings, "inference", "models", name="user")
    with (
        start(state, model, **overrides) as running,
        httpx.Client(base_url=running.url, headers=bearer(admin), timeout=LONGEST) as by_admin,
        httpx.Client(base_url=running.url, headers=bearer(user), timeout=LONGEST) as by_user,
    ):
        it = Subject(running, state, by_admin, by_user)
        yield it
        until(it.caught_up)
    _books(it, settings)


def _books(it: Subject, settings: Settings) -> None:
    """Each request that was answered is in the ledger once, and the audit log's chain holds."""
    with Database.open(settings.storage, it.state) as database:
        rows = database.read(lambda c: c.execute(USAGE.select()).all()).result()
        assert len(rows) == it.served
        assert database.read(audit.verify).result().ok
        log = database.read(lambda c: audit.entries(c, limit=1000)).result()
        assert [entry.event for entry in log].count("key_created") == it.written + len(("admin", "user"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "mlxd-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED HERE: needs root, who may mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take the last byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return ballast


def test_a_full_disk(small_disk: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and log are both on it."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))  # where `started` puts the log
    with subject(small_disk / "state", tiny_model_dir) as it:
        it.serves()
        assert it.writes()
        ballast = fill(small_disk)
        until(lambda: not it.writes())  # the log of the database has room for some
        assert it.write() == (503, "storage_unavailable")
        it.serves(20)
        assert it.metric('mlxd_storage_failures_total{reason="full"}') > 0
        until(lambda: it.metric("mlxd_log_lines_dropped_total") > 0)
        ballast.unlink()
        until(it.writes)
        it.serves()


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: needs prlimit(2)")
def test_a_disk_that_takes_no_writes_any_more(tmp_path: Path, tiny_model_dir: Path) -> None:
    """By a limit of the process: every write to a file fails, of the log too, as on a disk that is broken."""
    with subject(tmp_path / "state", tiny_model_dir) as it:
        it.serves()
        process = psutil.Process(it.running.pid)
        soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
        assert it.write() == (503, "storage_unavailable")
        it.serves(20)
        assert it.metric("mlxd_storage_failures_total{") > 0
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
        until(it.writes)
        it.serves()


def test_a_database_that_another_process_locks(tmp_path: Path, tiny_model_dir: Path) -> None:
    with subject(tmp_path / "state", tiny_model_dir, MLXD_STORAGE__BUSY_TIMEOUT="0.3") as it:
        it.serves()
        with closing(sqlite3.connect(it.state / "mlxd.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert it.write() == (503, "storage_unavailable")
            it.serves(20)
            assert it.metric('mlxd_storage_failures_total{reason="locked"}') > 0
            other.execute("ROLLBACK")
        until(it.writes)
        it.serves()


def test_a_state_directory_that_is_read_only_at_a_start(small_disk: Path, tiny_model_dir: Path) -> None:
    """It is up and says why it is not ready; once it may write it serves, without a restart."""
    state = small_disk / "state"
    key = make_key(Settings.load(None, {"server.state_dir": state}), "inference")
    with start(state, tiny_model_dir):
        pass  # on a CPU mlx compiles kernels into it, once
    _remount(small_disk, "ro")
    try:
        with (
            start(state, tiny_model_dir) as running,
            httpx.Client(base_url=running.url, headers=bearer(key), timeout=LONGEST) as client,
        ):
            body = {"prompt": "x", "max_tokens": 4}
            answer = client.post("/generate", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert client.get("/livez").status_code == 200
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["state"]) == (503, "ready")
            assert "storage" in ready.json()["reasons"][0]
            _remount(small_disk, "rw")
            until(lambda: client.get("/readyz").status_code == 200)
            assert client.post("/generate", json=body).status_code == 200
    finally:
        _remount(small_disk, "rw")


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


JUMPING = """
import time
real = time.time
def jumping():
    with open({clock!r}) as offset:
        return real() + float(offset.read())
time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)
"""


def test_a_clock_that_jumps(tmp_path: Path, tiny_model_dir: Path) -> None:
    """An hour on, two hours back and home again, a stream running each time: the wall clock of all Python code."""
    clock, site = tmp_path / "clock", tmp_path / "site"
    clock.write_text("0")
    site.mkdir()
    (site / "sitecustomize.py").write_text(JUMPING.format(clock=str(clock)))
    with subject(tmp_path / "state", tiny_model_dir, PYTHONPATH=str(site)) as it:
        settings = Settings.load(None, {"server.state_dir": it.state})
        short = make_key(settings, "models", name="short", expires_at=time.time() + 1800)
        it.written += 1
        until(lambda: _status(it, short) == 200)
        for jump, status in ((3600, 401), (-3600, 200), (0, 200)):
            _stream_over(it, lambda jump=jump: _set(clock, jump))  # type: ignore[misc]
            assert abs(it.admin.get("/admin/status").json()["uptime_seconds"] - max(0, jump)) < 60
            assert _status(it, short) == status
            it.serves()
            assert it.writes()


def _set(clock: Path, seconds: int) -> None:
    draft = clock.with_suffix(".new")
    draft.write_text(str(seconds))
    draft.replace(clock)


def _status(it: Subject, key: IssuedKey) -> int:
    return httpx.get(f"{it.running.url}/v1/models", headers=bearer(key), timeout=LONGEST).status_code


def _stream_over(it: Subject, event: Callable[[], None]) -> None:
    """Whatever happens while it runs, a stream comes to its end."""
    with it.user.stream("POST", "/generate", json={"prompt": "x", "max_tokens": 300, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        event()
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert not any('"error"' in line for line in rest)
    it.served += 1
