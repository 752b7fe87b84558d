"""Cells of the fault matrix: one fault in one phase, in a process of its own, with clients that see what they get."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import ROOT
from tests.serving import _banner_url

FAULTS = ("hang", "hold", "livelock", "leak", "abort", "raise", "fail", "die", "loop")
PHASES = ("idle", "prefill", "decode", "draining")

STALL_TIMEOUT = 2.0
LOOP_TIMEOUT = 4.0
TIMEOUT = 60.0

DETECTED = (
    *("watchdog_tripped", "memory_overgrown", "step_failed", "canary_failed", "engine_failed"),
    *("uncaught_exception", "drain_overdue"),
)
TEXTS = ("Timeout (0:0", "Fatal Python error: Aborted")
"""What the interpreter writes to standard error where no log event can be."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one cell. Times are in seconds; `detected` and `ended` since the fault."""

    fault: str
    phase: str
    running: str
    """What the client got whose request ran; empty where there was none."""
    waiting: str
    events: list[str]
    watch: str
    counted: dict[str, float]
    """Metrics, as the process left them; nothing where it had no time to tell."""
    code: int
    detected: float | None
    ended: float
    start: float
    log: str

    @property
    def cell(self) -> str:
        return f"{self.fault} x {self.phase}"


def run_cells(cells: list[tuple[str, str]], folder: Path, *, at_once: int) -> list[Outcome]:
    """Run the cells, `at_once` of them side by side."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda cell: run_cell(cell[0], cell[1], folder / "-".join(cell)), cells))


def run_cell(fault: str, phase: str, folder: Path) -> Outcome:
    """Start, bring the service into the phase, let the fault strike, and see what everybody gets."""
    folder.mkdir(parents=True)
    settings = {
        "server.port": 0,
        "ops.bind": "",
        "auth.enabled": False,
        "engine.max_rows": 1,
        "watchdog.stall_timeout": STALL_TIMEOUT,
        "watchdog.loop_timeout": LOOP_TIMEOUT,
        "watchdog.canary_interval": 0.2 if phase == "idle" else 0.0,
    }
    (folder / "settings").write_text(json.dumps(settings))
    began = time.time()
    with (
        _process(fault, phase, folder) as process,
        httpx.Client(timeout=TIMEOUT, verify=False) as http,
        ThreadPoolExecutor(3) as pool,
    ):
        http.base_url = _banner_url(process, folder / "log")
        start = time.time() - began
        ended = pool.submit(_wait, process)
        clients = _clients(http, phase, pool)
        if phase == "draining":
            process.send_signal(signal.SIGTERM)
            _until(lambda: '"draining"' in (folder / "log").read_text("utf-8"))
        (folder / "strike").touch()
        _until((folder / "struck").exists)
        got = [client.result(TIMEOUT) for client in clients]
        if fault == "raise" and phase != "draining":  # the service is to live on
            _until(lambda: '"step_failed"' in (folder / "log").read_text("utf-8"))
            assert _readyz(http)["ready"]
            process.send_signal(signal.SIGTERM)
        code, end = ended.result(TIMEOUT)
    return _outcome(fault, phase, folder, got, code=code, end=end, start=start)


@contextmanager
def _process(fault: str, phase: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "MLXD_"))}
    command = [sys.executable, "-m", "tests.faulty_service", str(folder), fault, phase]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, env=outside, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    return process.wait(TIMEOUT), time.time()


def _clients(http: httpx.Client, phase: str, pool: ThreadPoolExecutor) -> list[Future[str]]:
    """One whose request runs, streamed, and one that waits behind it; nobody in an idle service."""
    if phase == "idle":
        return []
    streaming = threading.Event()
    running = pool.submit(_stream, http, streaming)
    if phase != "prefill":
        assert streaming.wait(TIMEOUT)
    _until(lambda: _readyz(http)["running"] == 1)
    waiting = pool.submit(_whole, http)
    _until(lambda: _readyz(http)["waiting"] == 1)
    return [running, waiting]


def _readyz(http: httpx.Client) -> dict[str, Any]:
    return dict(http.get("/readyz").json())


def _until(condition: Any) -> None:
    ends = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def _stream(http: httpx.Client, begun: threading.Event) -> str:
    """How a stream ends: `done`, an error's code, or `cut`."""
    body = {"prompt": "a prompt that is long enough " * 2, "max_tokens": 1000, "temperature": 0, "stream": True}
    last = "nothing"
    try:
        with http.stream("POST", "/generate", json=body) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {json.loads(answer.read())['error']['code']}"
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    last = line.removeprefix("data: ")
                    begun.set()
    except httpx.TransportError:
        return "cut"
    if last == "[DONE]":
        return "done"
    return str(json.loads(last)["error"]["code"]) if '"error"' in last else "cut"


def _whole(http: httpx.Client) -> str:
    try:
        answer = http.post("/generate", json={"prompt": "hi", "max_tokens": 3})
    except httpx.TransportError:
        return "cut"
    return "200" if answer.status_code == 200 else f"{answer.status_code} {answer.json()['error']['code']}"


def _outcome(fault: str, phase: str, folder: Path, got: list[str], *, code: int, end: float, start: float) -> Outcome:
    log = (folder / "log").read_text("utf-8")
    struck = float((folder / "struck").read_text())
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    found = [line for line in lines if line["event"] in DETECTED and _seconds(line) >= struck - 0.1]
    texts = [text for text in TEXTS if text in log and not found]
    counted = folder / "counted"
    return Outcome(
        fault=fault,
        phase=phase,
        running=got[0] if got else "",
        waiting=got[1] if got else "",
        events=[*dict.fromkeys(line["event"] for line in found), *texts],
        watch=next((line["watch"] for line in found if "watch" in line), ""),
        counted=json.loads(counted.read_text()) if counted.exists() else {},
        code=code,
        detected=round(_seconds(found[0]) - struck, 2) if found else None,
        ended=round(end - struck, 2),
        start=round(start, 2),
        log=log,
    )


def _seconds(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()
