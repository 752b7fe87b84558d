"""`mlxd serve --supervised` as a real process: what cannot be mended stays down and says why; what may pass is waited
for with the ports bound; what died is started with less."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.supervision.host_lock import HostLock
from service.supervision.starts import StartLedger, StartRecord
from tests.conftest import ROOT

PATIENCE = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Supervised:
    """One start in `folder`; its state is there, and its lock, so that services of other tests are not met."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int
    ops_port: int

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text("utf-8", "replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (line for line in self.output.splitlines() if line.startswith("{"))
        return [found for found in map(json.loads, lines) if found["event"] == name]

    def ask(self, path: str, *, ops: bool = False) -> dict[str, Any] | None:
        """The answer; None while nobody listens."""
        try:
            url = f"http://127.0.0.1:{self.ops_port if ops else self.port}{path}"
            return dict(httpx.get(url, timeout=10).json())
        except httpx.TransportError:
            return None

    def until(self, wanted: Callable[[dict[str, Any]], bool], *, path: str = "/readyz", ops: bool = False) -> Any:
        """The first answer that is as `wanted`."""
        seen: list[dict[str, Any]] = []

        def looks_right() -> bool:
            found = self.ask(path, ops=ops)
            seen[:] = [] if found is None else [found]
            return found is not None and wanted(found)

        self._wait(looks_right)
        return seen[0]

    def until_reason(self, text: str, *, ops: bool = False) -> str:
        found = self.until(lambda said: any(text in reason for reason in said["reasons"]), ops=ops)
        assert found["ready"] is False
        return next(str(reason) for reason in found["reasons"] if text in reason)

    def until_event(self, name: str) -> None:
        """Wait for a line of the log."""
        self._wait(lambda: bool(self.events(name)))

    def until_begun(self, number: int) -> None:
        """Wait until so many starts are in the ledger."""
        self._wait(lambda: len(StartLedger(self.folder).read().starts) == number)

    def _wait(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < ends, self.output
            time.sleep(0.02)

    def stop(self) -> float:
        """Seconds from SIGTERM to exit code 0."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        return time.monotonic() - began

    def down(self) -> str:
        """Why it stays down, once it has ended with 0."""
        assert self.process.wait(PATIENCE) == 0, self.output
        return StartLedger(self.folder).read().down_because


Begin = Callable[..., Supervised]


@pytest.fixture
def begin(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Begin]:
    tmp_path.chmod(0o700)
    begun: list[Supervised] = []

    def start(*, supervised: bool = True, port: int | None = None, **overrides: str) -> Supervised:
        port, ops_port = free_port() if port is None else port, free_port()
        ours = {
            "MLXD_MODEL__REFERENCE": str(tiny_model_dir),
            "MLXD_SERVER__STATE_DIR": str(tmp_path),
            "MLXD_SERVER__PORT": str(port),
            "MLXD_OPS__BIND": f"127.0.0.1:{ops_port}",
            "MLXD_AUTH__ENABLED": "false",
            "MLXD_LOG__FORMAT": "json",
            "MLXD_SUPERVISED__HOST_LOCK": str(tmp_path / "lock" / "engine.lock"),
            "MLXD_SUPERVISED__BACKOFF_FIRST": "0.2",
        }
        command = [sys.executable, "-m", "service", "serve", *(["--supervised"] if supervised else [])]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **ours, **overrides}, stdout=output, stderr=output
            )
        begun.append(Supervised(tmp_path, process, port, ops_port))
        return begun[-1]

    yield start
    for each in begun:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()


def last(service: Supervised) -> StartRecord:
    return StartLedger(service.folder).read().starts[-1]


# What cannot be mended ----------------------------------------------------------------------------------------


def test_a_configuration_that_cannot_validate_is_one_logged_reason_exit_0_and_in_the_ledger(begin: Begin) -> None:
    service = begin(MLXD_SERVER__MAX_CONNECTIONS="none", MLXD_ENGINE__STEP_TARGET="-1")
    reason = service.down()
    assert "server.max_connections: " in reason
    assert "engine.step_target: " in reason
    [line] = service.output.splitlines()
    said = json.loads(line)
    assert (said["event"], said["level"], len(said["problems"])) == ("stays_down", "error", 2)


def test_in_a_shell_it_is_78_and_no_ledger(begin: Begin) -> None:
    service = begin(supervised=False, MLXD_SERVER__MAX_CONNECTIONS="none")
    assert service.process.wait(PATIENCE) == os.EX_CONFIG
    assert service.output.startswith("mlxd: configuration: server.max_connections: ")
    assert not StartLedger(service.folder).file.exists()


def test_what_only_shows_in_use_stays_down_too(begin: Begin, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    service = begin(MLXD_SERVER__TLS_CERTIFICATE=absent, MLXD_SERVER__TLS_KEY=absent)
    assert "server.tls_certificate" in service.down()
    assert len(service.events("stays_down")) == 1
    assert len(StartLedger(service.folder).read().starts) == 1


def test_after_starts_that_could_never_have_succeeded_it_stays_down_without_another_try(
    begin: Begin, tmp_path: Path
) -> None:
    for ago in range(10, 0, -1):
        began = time.time() - 60 * ago
        StartLedger(tmp_path).put(StartRecord(began=began, pid=1, ended=began + 1, exit_code=70, reason="no start-up"))
    service = begin()
    assert service.down() == "10 starts in a row ended before they were ready; the last one: no start-up"
    assert not service.events("listening")


# What may pass ------------------------------------------------------------------------------------------------


def test_whatever_is_missing_is_told_until_it_is_there_and_then_the_model_is_loaded(
    begin: Begin, tmp_path: Path, tiny_model_dir: Path
) -> None:
    missing, another = tmp_path / "model", HostLock(tmp_path / "lock" / "engine.lock")
    assert another.take() == ""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        service = begin(port=port, MLXD_MODEL__REFERENCE=str(missing))
        service.until_reason(f"cannot listen on 127.0.0.1:{port}: Address already in use; next try at", ops=True)
        assert not service.events("listening")
    service.until_reason(f"another engine runs on this host: process {os.getpid()} holds")
    another.release()
    service.until_reason(f"{missing} does not exist: check the path; next try at")
    assert httpx.post(f"http://127.0.0.1:{port}/generate", json={"prompt": "x"}).status_code == 503
    missing.symlink_to(tiny_model_dir)
    service.until(lambda said: said["ready"])
    answer = httpx.post(f"http://127.0.0.1:{port}/generate", json={"prompt": "x", "max_tokens": 2}, timeout=30)
    assert answer.status_code == 200
    limits = service.events("memory_limits")[-1]
    assert limits["memory_limit"] > limits["weights"] + limits["budget"]
    assert limits["wired_limit"] is None
    service.stop()
    assert (last(service).exit_code, last(service).reason) == (0, "")
    assert last(service).ready is not None


def test_a_model_that_never_comes_ends_with_0_and_the_reason(begin: Begin, tmp_path: Path) -> None:
    service = begin(MLXD_MODEL__REFERENCE=str(tmp_path / "model"), MLXD_SUPERVISED__GIVE_UP_AFTER="0.5")
    assert f"{tmp_path}/model does not exist" in service.down()
    assert len(service.events("load_delayed")) >= 2
    assert len(service.events("stays_down")) == 1


@pytest.mark.alone
def test_with_both_ports_taken_a_stop_takes_less_than_a_second(begin: Begin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as third:
        taken = f"127.0.0.1:{third.getsockname()[1]}"
        service = begin(port=other.getsockname()[1], MLXD_OPS__BIND=taken, MLXD_SUPERVISED__BACKOFF_FIRST="3600")
        service.until_event("load_delayed")
        assert service.stop() < 1


# What died ----------------------------------------------------------------------------------------------------


def test_after_three_kills_it_waits_and_then_serves_in_safe_mode(begin: Begin, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        service = begin()
        service.until_begun(number)
        service.process.kill()
        service.process.wait()
    service = begin()
    service.until_reason("the last starts failed; loading begins at ")
    service.until(lambda said: said["ready"])
    status = service.ask("/admin/status", ops=True)
    assert status is not None
    assert status["start"] == {
        "supervised": True,
        "safe_mode": "3 starts died within an hour",
        "died_recently": 3,
    }
    assert status["requests"]["max_running"] == 1
    metrics = httpx.get(f"http://127.0.0.1:{service.ops_port}/metrics").text
    assert "mlxd_safe_mode 1.0" in metrics
    assert "mlxd_recent_deaths 3.0" in metrics
    service.stop()
    assert last(service).safe_mode == "3 starts died within an hour"


@pytest.mark.alone
def test_a_stop_during_the_wait_after_failed_starts_takes_less_than_a_second(begin: Begin, tmp_path: Path) -> None:
    began = time.time() - 5
    StartLedger(tmp_path).put(StartRecord(began=began, pid=1, ended=began + 1, exit_code=70))
    service = begin(MLXD_SUPERVISED__BACKOFF_FIRST="3600", MLXD_SUPERVISED__BACKOFF_MAX="3600")
    service.until_reason("the last starts failed")
    assert service.stop() < 1
    assert (last(service).exit_code, last(service).reason) == (0, "")
