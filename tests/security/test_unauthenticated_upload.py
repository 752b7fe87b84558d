"""Strangers cannot make the service hold what they send."""

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.serving import Running, started

SIZE = 300_000_000
ALLOWED = 20_000_000
PIECE = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def running(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("state")
    folder.chmod(0o700)
    overrides = {"MLXD_MODEL__REFERENCE": str(tiny_model_dir), "MLXD_AUTH__ENABLED": "true"}
    with started(folder, timed=True, **overrides) as found:
        yield found


def forget_peak(pid: int) -> None:
    """Let the process's peak begin anew, at what it has now: loading the model took more (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", "utf-8")


def peak(pid: int) -> int:
    """The most memory that the process had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def upload(port: int, head: bytes) -> tuple[int, bytes]:
    """Send up to SIZE bytes as fast as they are taken; the bytes that were, and the answer."""
    sent, heard = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as wire:
        wire.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + head + b"\r\n"
        )
        with suppress(ConnectionError):
            while sent < SIZE:
                wire.sendall(PIECE)
                sent += len(PIECE)
        with suppress(ConnectionError):
            while piece := wire.recv(65536):
                heard += piece
    return sent, heard


@pytest.mark.parametrize(
    "head",
    [
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nAuthorization: Bearer mlxd_live_nonsense\r\n",
        b"Content-Length: 300000000\r\n",
    ],
    ids=["chunked", "with a wrong key", "declared"],
)
def test_an_upload_of_300_megabytes_costs_less_than_20_of_memory(running: Running, head: bytes) -> None:
    port = httpx.URL(running.url).port or 0
    with suppress(ConnectionError):
        upload(port, b"Content-Length: 1\r\n")  # whatever the first refusal costs
    forget_peak(running.pid)
    before = peak(running.pid)
    taken = 0
    while taken < SIZE:  # the connection is closed after a moment: the stranger comes again
        sent, heard = upload(port, head)
        taken += sent
        assert heard == b"" or heard.startswith(b"HTTP/1.1 401 ")  # a reset may have destroyed it
    moved = peak(running.pid) - before
    print(f"{taken / 1e6:.0f} MB sent without credentials: peak memory moved by {moved / 1e6:.1f} MB")
    assert moved < ALLOWED


def test_nothing_is_asked_for_before_the_refusal(running: Running) -> None:
    """Not even `100 Continue`."""
    port = httpx.URL(running.url).port or 0
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 300000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as wire:
        wire.sendall(head)
        heard = b""
        while piece := wire.recv(65536):
            heard += piece
    assert heard.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in heard
    assert b"\r\nconnection: close\r\n" in heard.lower()
