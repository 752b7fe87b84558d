"""What takes the log is full, closed or stalled: the service does not notice, and the operator does."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from service.observability.redaction import redact

QUEUE = 40
LONGEST_ANSWER = 2.0
"""Seconds; one that waited for a reader would never come."""
LONGEST_EXIT = 15.0

PROGRAM = f"""
import sys
from pathlib import Path
from service.app import build
from service.cli.context import prepare
from service.serve import leave_now, run
from service.settings import Settings
from tests.fakes import FakeBackend
from tests.serving import AMPLE

ours = dict(AMPLE)
ours["server.port"], ours["server.state_dir"], ours["ops.bind"] = 0, Path(sys.argv[1]), "127.0.0.1:0"
ours["auth.enabled"], ours["log.queue_lines"] = False, {QUEUE}
settings = Settings.load(None, ours)
prepare(settings)
leave_now(run(settings, build=lambda each: build(each, FakeBackend())))
"""


@contextmanager
def started(state_dir: Path, stdout: Any, stderr: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The service over a scripted engine, as a process of its own; killed where it is still there at the end."""
    command = [sys.executable, "-c", PROGRAM, str(state_dir)]
    with subprocess.Popen(command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.kill()


def url_of(said: IO[bytes]) -> str:
    """From the banner, of which no more is read than it takes."""
    for line in said:
        if found := re.search(rb"ready on (http://[^;\s]+);", line):
            return found[1].decode()
    raise AssertionError("there was no banner")


def dropped(url: str) -> float:
    found = re.search(r"^mlxd_log_lines_dropped_total (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def ask(client: httpx.Client, times: int) -> None:
    """Requests of every kind, all of which must be served."""
    for number in range(times):
        assert client.get("/v1/models").status_code == 200
        if number % 20 == 0:
            body = {"prompt": "x", "max_tokens": 5, "stream": number % 40 == 0}
            assert client.post("/generate", json=body).status_code == 200


def fill(running: subprocess.Popen[bytes]) -> None:
    """Its output to the last byte: a stalled pipe may still have room for a short line."""
    output = Path(f"/proc/{running.pid}/fd/1")
    if output.exists():
        writer = os.open(output, os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b".")
        os.close(writer)


def ends(running: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    running.terminate()
    assert running.wait(LONGEST_EXIT) == 0
    print(f"ended {time.monotonic() - began:.1f} s after the signal")


def test_a_pipe_that_nobody_reads_reaches_no_request_nor_the_exit(tmp_path: Path) -> None:
    """Both streams are one pipe, as in `mlxd serve 2>&1 | reader` with a reader that is stopped."""
    with started(tmp_path, subprocess.PIPE, subprocess.STDOUT) as running:
        assert running.stdout is not None
        url = url_of(running.stdout)
        with httpx.Client(base_url=url, timeout=LONGEST_ANSWER) as client:
            while (lost := dropped(url)) == 0:
                ask(client, 200)
            ask(client, 40)
            assert dropped(url) >= lost + 40, "each new line costs an old one"
            os.set_blocking(running.stdout.fileno(), False)
            held = b""
            while b'"log_lines_dropped"' not in held:  # it is read again
                ask(client, 1)
                held += running.stdout.read() or b""
            whole = held.split(b"\n")[1:-1]
            lines = [json.loads(line) for line in whole if line.startswith(b"{")]
            told = [line["lines"] for line in lines if line["event"] == "log_lines_dropped"]
            assert told
            assert dropped(url) >= told[0] >= lost
            lost = dropped(url)
            while dropped(url) < lost + 10:  # and again nobody does
                ask(client, 200)
            fill(running)
            ask(client, 20)
        ends(running)


def test_a_full_disk_reaches_no_request_nor_the_exit(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("NOT TESTED HERE: there is no /dev/full")
    with Path("/dev/full").open("wb") as full, started(tmp_path, subprocess.PIPE, full) as running:
        assert running.stdout is not None
        url = url_of(running.stdout)
        with httpx.Client(base_url=url, timeout=LONGEST_ANSWER) as client:
            before = dropped(url)
            ask(client, 100)
            while dropped(url) < before + 100:  # the last one is written beside the answer
                pass
        ends(running)


def test_a_reader_that_left_reaches_no_request_nor_the_exit(tmp_path: Path) -> None:
    with started(tmp_path, subprocess.PIPE, subprocess.STDOUT) as running:
        assert running.stdout is not None
        url = url_of(running.stdout)
        running.stdout.close()
        with httpx.Client(base_url=url, timeout=LONGEST_ANSWER) as client:
            ask(client, 100)
            while dropped(url) < 100:
                pass
        ends(running)


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_the_line_of_a_crash_is_not_lost_and_quotes_nobody(tmp_path: Path, fmt: str) -> None:
    program = f"""
import sys, threading
from pathlib import Path
from service.cli.context import prepare
from service.observability.logging import get_logger
from service.settings import Settings
prepare(Settings.load(None, {{"server.state_dir": Path(sys.argv[1]), "log.format": "{fmt}"}}))
for number in range(500):
    get_logger("service.x").info("event", number=number)
raise ValueError("a canary of a prompt")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "uncaught_exception" in ended.stderr
    assert "ValueError" in ended.stderr
    assert ended.stderr.count("number") == 500
    assert "canary" not in ended.stderr
    if fmt == "json":
        assert all(json.loads(line) for line in ended.stderr.splitlines())


@pytest.mark.parametrize("unit", ["eyJ", "eyJaaaaa", "eyJaaaaa.", "mlxd_live_", "Bearer ", "basic\t", "://a:", "sk-"])
def test_redaction_takes_time_that_is_linear_whatever_the_text(unit: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        began = time.thread_time()
        redact(text)
        return time.thread_time() - began

    short, long = (min(seconds(length) for _ in range(5)) for length in (20_000, 320_000))
    print(f"{unit!r}: {short * 1e6:.0f} us for 20,000 characters, {long * 1e6:.0f} us for 320,000")
    assert long < 64 * max(short, 50e-6), "16 times as long"
