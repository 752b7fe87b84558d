"""The real service under the harness, by the plist that `mlxd service render` prints: killed, stopped, misconfigured.

`make test` has a tiny model, few rounds, and scales launchd's seconds; `make soak` has the demo model and all of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from service.launchd import readiness
from service.launchd.layout import Layout
from service.launchd.plist import Job, problems
from service.settings import Settings, as_toml
from service.storage import audit, keys
from service.storage.database import Database
from tests.faults import test_kill, test_usage_kill
from tests.launchd.harness import Run, Supervisor
from tests.serving import AMPLE, bearer, make_key

START_TIMEOUT = 180
SLOWER_START = 2.0
"""Seconds from a kill until it is ready again, beyond the first start's load and the throttle."""

STREAMS = 32
END_TOKENS = (0, 2)
"""Of both models."""

OF_THIS_MACHINE = ("LD_PRELOAD", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

FOR_TESTS = {
    "supervised.host_lock": "off",  # other tests have engines too
    "supervised.stable_after": 0,  # who is killed for a test has not failed to start
    "supervised.safe_mode_deaths": 30,
    "watchdog.canary_interval": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What `make soak` has larger. A CPU decodes as many rows of the demo model together as its step's time allows, and
    the others wait: so not all streams have `begun` when the signal comes, and those get 503."""

    model: str
    scale: float
    max_tokens: int
    begun: int
    drain_timeout: int
    pause: float = 0.0
    """Of those who create keys: without one they take the CPU from a model that runs on it."""


@pytest.fixture
def scenario(tiny_model_dir: Path, state_dir: Path, pytestconfig: pytest.Config) -> Scenario:
    if not pytestconfig.getoption("full_counts"):
        return Scenario(
            model=str(tiny_model_dir), scale=0.2, max_tokens=300, begun=STREAMS, drain_timeout=30, pause=0.0
        )
    from service.engine.models import resolve

    model = resolve("demo", state_dir=state_dir, offline=False).path
    return Scenario(model=str(model), scale=1.0, max_tokens=100, begun=4, drain_timeout=120, pause=0.2)


@dataclass(frozen=True, slots=True)
class Installed:
    """A rendered plist and its configuration, on a port that nobody has."""

    layout: Layout
    settings: Settings
    url: str
    supervisor: Supervisor

    def until_ready(self, timeout: float = START_TIMEOUT) -> float:
        """The moment at which it was."""
        ends = time.monotonic() + timeout
        while not readiness.ask(self.url).ready:
            assert time.monotonic() < ends, (self.supervisor.runs, self.output())
            time.sleep(0.02)
        return time.monotonic()

    def output(self) -> str:
        """What it said, logs included."""
        found = [
            each.read_text("utf-8", "replace") for each in (self.layout.crash_log, self.layout.log) if each.exists()
        ]
        return "".join(found)[-5000:]


@pytest.fixture
def installed(tmp_path: Path, scenario: Scenario) -> Installed:
    layout = Layout.daemon(root=tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values: dict[str, Any] = {
        "server.port": port,
        "server.state_dir": str(layout.state),
        "ops.bind": "",
        "engine.drain_timeout": scenario.drain_timeout,
        "model.reference": scenario.model,
        "limits.plans": AMPLE["limits.plans"],
        "log.format": "json",
        **FOR_TESTS,
    }
    for folder in (layout.state, layout.logs, layout.config.parent, layout.plist.parent):
        folder.mkdir(parents=True)
    layout.config.write_text(as_toml(values))
    settings = Settings.load(layout.config)
    layout.plist.write_bytes(Job.of(layout, settings, agent_interpreter=Path(sys.executable)).render())
    assert problems(layout.plist.read_bytes(), settings) == []
    extra = {name: os.environ[name] for name in OF_THIS_MACHINE if name in os.environ}
    supervisor = Supervisor(layout.plist, scale=scenario.scale, extra=extra)
    return Installed(layout, settings, f"http://127.0.0.1:{port}", supervisor)


@pytest.mark.timeout(7200)
def test_a_killed_service_is_started_again_and_has_lost_nothing(
    installed: Installed, scenario: Scenario, count: Callable[[str, int, int], int]
) -> None:
    settings, supervisor = installed.settings, installed.supervisor
    key = make_key(settings, "inference", "admin").text
    created: set[str] = set()
    revoked: set[str] = set()
    seconds: list[float] = []
    with supervisor:
        load = installed.until_ready() - supervisor.runs[0].began
        for number in range(1, count("services killed in mid-stream under the harness", 2, 20) + 1):
            changes = test_kill.Load(installed.url, key, scenario.pause)
            usage = test_usage_kill.Load(installed.url, key)
            assert changes.enough.wait(120)
            usage.for_seconds(test_usage_kill.LOST_AT_MOST + 0.3)
            stream = Stream(installed.url, key, 4000)
            assert stream.begun.wait(120)
            before = supervisor.last
            killed = time.monotonic()
            supervisor.signal(signal.SIGKILL)
            changes.join()
            usage.join()
            stream.join()
            assert not stream.whole
            supervisor.wait(lambda number=number: len(supervisor.runs) > number)  # type: ignore[misc]
            ready = installed.until_ready()
            assert supervisor.last.began >= before.began + supervisor.throttle
            seconds.append(ready - killed)
            created |= changes.created
            revoked |= changes.revoked
            _intact(settings, created, revoked)
            found = test_usage_kill.recorded(settings)
            lost = [killed - at for request, at in usage.answered.items() if request not in found]
            assert max(lost, default=0.0) <= test_usage_kill.LOST_AT_MOST
            assert set(found.values()) == {1}
        assert [run.status for run in supervisor.runs[:-1]] == [-signal.SIGKILL] * len(seconds)
        assert httpx.post(f"{installed.url}/v1/completions", json=_body(4), headers=bearer(key)).status_code == 200
    print(f"{len(seconds)} kills in mid-stream: {len(created)} keys created, {len(revoked)} revoked, none lost")
    print(f"ready after {load:.2f} s at first; after a kill {median(seconds):.2f} s, at most {max(seconds):.2f} s")
    assert max(seconds) <= load + supervisor.throttle + SLOWER_START
    assert (supervisor.last.status, supervisor.last.killed) == (0, False)


def _intact(settings: Settings, created: set[str], revoked: set[str]) -> None:
    with Database.open(settings.storage, settings.server.state_dir) as database:
        stored = {record.kid: record for record in database.read(keys.all_keys).result()}
        assert created <= stored.keys(), "an acknowledged key is gone"
        assert all(stored[kid].revoked_at is not None for kid in revoked), "an acknowledged revocation is gone"
        report = database.read(audit.verify).result()
        assert report.ok, report


@pytest.mark.timeout(7200)
def test_sigterm_under_32_streams_cuts_none(
    installed: Installed, scenario: Scenario, count: Callable[[str, int, int], int]
) -> None:
    supervisor = installed.supervisor
    key = make_key(installed.settings, "inference").text
    took: list[float] = []
    running = waited = 0
    with supervisor:
        for number in range(count(f"SIGTERM under {STREAMS} streams", 2, 50)):
            if number:
                supervisor.start()
            installed.until_ready()
            streams = [Stream(installed.url, key, scenario.max_tokens) for _ in range(STREAMS)]
            _wait_until(lambda streams=streams: sum(each.begun.is_set() for each in streams) >= scenario.begun)  # type: ignore[misc]
            running += sum(each.begun.is_set() and not each.over.is_set() for each in streams)
            began = time.monotonic()
            run = supervisor.stop()
            for stream in streams:
                stream.join()
            assert [each.tail for each in streams if not (each.whole or each.refused)] == []
            waited += sum(each.refused for each in streams)
            took.append(_clean_end(run, began, supervisor))
    print(f"{len(took)} SIGTERMs under {STREAMS} streams, {running} of them running: none truncated, exit code 0")
    print(f"{waited} that still waited got 503 draining")
    print(f"ended after {median(took):.1f} s, at most {max(took):.1f} s of {supervisor.exit_timeout:.0f} s")
    assert running >= len(took) * scenario.begun / 2, "the streams were over before the signal"


def _wait_until(true: Callable[[], object]) -> None:
    ends = time.monotonic() + START_TIMEOUT
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


def _clean_end(run: Run, began: float, supervisor: Supervisor) -> float:
    assert run.ended is not None
    assert (run.status, run.killed) == (0, False)
    assert run.ended - began < supervisor.exit_timeout
    return run.ended - began


def test_a_configuration_that_cannot_validate_stays_down_with_one_reason(installed: Installed) -> None:
    with installed.layout.config.open("a") as config:
        config.write("\n[nonsense]\nkey = 1\n")
    with (supervisor := installed.supervisor):
        supervisor.wait(lambda: supervisor.runs and supervisor.last.ended)
        assert supervisor.last.status == 0
        assert not supervisor._wanted
    assert len(supervisor.runs) == 1
    lines = [line for line in installed.output().splitlines() if "nonsense" in line]
    assert len(lines) == 1
    start = json.loads((installed.layout.state / "starts.json").read_text())["starts"][-1]
    assert "nonsense" in start["reason"]


class Stream:
    """One stream in a thread: it has `begun` with its first token, is `over`, and is `whole` if it ended well."""

    def __init__(self, url: str, key: str, max_tokens: int) -> None:
        self._url, self._headers, self._max_tokens = url, bearer(key), max_tokens
        self.begun, self.over = threading.Event(), threading.Event()
        self.whole = self.refused = False
        self.tail = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = _body(self._max_tokens, stream=True)
        lines: list[str] = []
        with suppress(httpx.TransportError):
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=body, headers=self._headers, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):  # not a comment that keeps the connection alive
                        lines.append(line.removeprefix("data: "))
                        self.begun.set()
                    elif answer.status_code != httpx.codes.OK:
                        self.refused = answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and '"draining"' in line
            self.whole = lines[-1:] == ["[DONE]"] and not any(line.startswith('{"error"') for line in lines)
        self.tail = "\n".join(lines[-2:])
        self.over.set()

    def join(self) -> None:
        self._thread.join(180)
        assert not self._thread.is_alive()


def _body(max_tokens: int, **more: object) -> dict[str, object]:
    """Of a completion that does not end before its time."""
    never = {str(token): -100 for token in END_TOKENS}
    return {"model": "default", "prompt": "Once upon a time", "max_tokens": max_tokens, "logit_bias": never, **more}
