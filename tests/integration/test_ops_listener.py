"""The operator's listener of a real service: what it serves and to whom, and that no flood of the public port keeps
the operator from an answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.auth.api_keys import IssuedKey
from service.listening import OPS_CONNECTIONS, RESERVED_FILES
from service.settings import Settings
from tests.fakes import FakeBackend
from tests.serving import AMPLE, Running, Served, bearer, make_key, served, started

pytestmark = pytest.mark.anyio

CONNECTIONS = 200
STREAMS = 100
HALF_OPEN = 400
PATIENCE = 2.0
"""Seconds in which an operator has an answer, whatever the public port goes through, on two shared cores."""


# What is served, and to whom ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("ops")
    folder.chmod(0o700)
    return Settings.load(None, {"server.port": 0, "server.state_dir": folder, "server.max_connections": 20, **AMPLE})


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Served]:
    with served(settings, FakeBackend()) as found:
        yield found


@pytest.fixture(scope="module")
def key(settings: Settings, service: Served) -> IssuedKey:
    return make_key(settings, "inference", "models", "metrics", "usage", "admin")


async def test_it_serves_the_operator_and_nobody_else(service: Served, settings: Settings, key: IssuedKey) -> None:
    scraper = make_key(settings, "metrics")
    async with httpx.AsyncClient(base_url=service.ops_url) as http:
        for path in ("/health", "/livez", "/readyz"):
            assert (await http.get(path)).status_code == 200
        for path in ("/metrics", "/admin/status", "/admin/keys", "/docs", "/openapi.json", "/v1/models", "/nowhere"):
            assert (await http.get(path)).status_code == 401, "default deny, whatever there is"
        for path in ("/metrics", "/admin/status", "/admin/keys", "/admin/usage", "/docs", "/openapi.json"):
            assert (await http.get(path, headers=bearer(key))).status_code == 200
        assert (await http.get("/metrics", headers=bearer(scraper))).status_code == 200
        assert (await http.get("/admin/status", headers=bearer(scraper))).status_code == 403
        for method, path in (("POST", "/generate"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
            answer = await http.request(method, path, headers=bearer(key), json={"prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            assert answer.headers["x-request-id"]


async def test_the_status_is_the_real_services(service: Served, key: IssuedKey) -> None:
    async with httpx.AsyncClient(base_url=service.ops_url, headers=bearer(key)) as http:
        found = (await http.get("/admin/status")).json()
    assert (found["ready"], found["state"], found["reasons"]) == (True, "ready", [])
    assert found["storage"] == {"up": True, "usage_rows_pending": 0}
    assert (found["limits"], found["redis"], found["issuers"]) == ({"open_reservations": 0}, None, [])
    assert key.text not in json.dumps(found)


# What the listeners share, and what not -------------------------------------------------------------------------


def address(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    return parsed.host, parsed.port or 0


def refused(wire: socket.socket) -> bool:
    """Whether the service has closed the connection."""
    try:
        return wire.recv(1) == b""
    except ConnectionResetError:
        return True


async def test_public_connections_beyond_the_most_are_closed_at_once_and_the_operators_are_others(
    service: Served, key: IssuedKey
) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(address(service.url)))
        for _ in range(5):
            one_more = stack.enter_context(socket.create_connection(address(service.url), timeout=10))
            assert await asyncio.to_thread(refused, one_more)
        async with httpx.AsyncClient(base_url=service.ops_url, headers=bearer(key)) as http:
            metrics = (await http.get("/metrics")).text
        assert 'mlxd_http_refused_total{reason="too_many_connections"} 5.0' in metrics
    await reachable(service.url)


async def reachable(url: str) -> None:
    """Wait until a new connection is served: the service sees one by one that the others have left."""
    async with asyncio.timeout(10), httpx.AsyncClient(base_url=url) as http:
        while True:
            try:
                assert (await http.get("/livez")).status_code == 200
            except httpx.TransportError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_the_operators_listener_has_its_own_most_which_costs_the_public_one_nothing(service: Served) -> None:
    with ExitStack() as stack:
        for _ in range(OPS_CONNECTIONS):
            stack.enter_context(socket.create_connection(address(service.ops_url)))
        one_more = stack.enter_context(socket.create_connection(address(service.ops_url), timeout=10))
        assert await asyncio.to_thread(refused, one_more)
        async with httpx.AsyncClient(base_url=service.url) as http:
            assert (await http.get("/livez")).status_code == 200


async def test_what_others_do_to_their_limits_is_not_the_operators(tmp_path: Path) -> None:
    plan = {"default": {"requests_per_minute": 3, "request_burst": 3}}
    few = {"limits.failed_authentication_per_minute": 3, "limits.plans": plan}
    settings = Settings.load(None, {"server.port": 0, "server.state_dir": tmp_path, **few})
    with served(settings, FakeBackend()) as service:
        noisy, operator = make_key(settings, "models"), make_key(settings, "metrics")
        async with httpx.AsyncClient(base_url=service.url) as http:
            strangers = [(await http.get("/v1/models", headers=bearer("wrong"))).status_code for _ in range(5)]
            noise = [(await http.get("/v1/models", headers=bearer(noisy))).status_code for _ in range(5)]
        assert (strangers, noise) == ([401, 401, 401, 429, 429], [200, 200, 200, 429, 429])
        async with httpx.AsyncClient(base_url=service.ops_url, headers=bearer(operator)) as http:
            scrapes = [(await http.get("/metrics")).status_code for _ in range(4)]
        assert scrapes == [200, 200, 200, 429], "its own limits hold here as there"


# A flood ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("flooded")
    folder.chmod(0o700)
    ours = {
        "MLXD_MODEL__REFERENCE": str(tiny_model_dir),
        "MLXD_AUTH__ENABLED": "true",
        "MLXD_AUTH__DEVELOPMENT_KEY": "true",
        "MLXD_ENGINE__MAX_ROWS": "8",
        "MLXD_SERVER__MAX_CONNECTIONS": str(CONNECTIONS),
        "MLXD_LIMITS__PLANS": json.dumps({"default": dict.fromkeys(RATES, 100000) | {"tokens_per_minute": 2**40}}),
    }
    with started(folder, timed=True, **ours) as running:
        yield running


RATES = ("requests_per_minute", "request_burst", "concurrent_requests", "max_output_tokens")


def operators(running: Running) -> str:
    found = re.search(r"/admin also on (\S+)", running.output.read_text("utf-8"))
    assert found is not None
    return found[1]


def key_file(running: Running) -> Path:
    found = re.search(r"\$\(cat (\S+)\)", running.output.read_text("utf-8"))
    assert found is not None
    return Path(found[1])


def development_key(running: Running) -> dict[str, str]:
    return bearer(key_file(running).read_text().strip())


async def stream(running: Running, began: asyncio.Queue[None], max_tokens: int = 3500) -> None:
    """One of the clients that are served: it reads for as long as it is given something."""
    reader, writer = await asyncio.open_connection(*address(running.url))
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens, "stream": True, "temperature": 0}).encode()
    key = development_key(running)["authorization"]
    head = (
        f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: {key}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    try:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        began.put_nowait(None)
        while await reader.read(65536):
            pass
    finally:
        writer.close()


async def asked(http: httpx.AsyncClient, path: str) -> float:
    """Seconds for an answer over a new connection."""
    began = time.perf_counter()
    answer = await http.get(path, headers={"connection": "close"})
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - began


async def test_mlxd_top_shows_a_real_service_under_load(flooded: Running) -> None:
    began: asyncio.Queue[None] = asyncio.Queue()
    key = str(key_file(flooded))
    command = ["top", "--url", operators(flooded), "--key-file", key, "--once", "--json", "--interval", "2"]
    top = await asyncio.create_subprocess_exec(sys.executable, "-m", "service", *command, stdout=PIPE)
    shown = asyncio.create_task(top.communicate())

    async def ask() -> None:
        while not shown.done():
            await stream(flooded, began, max_tokens=50)

    await asyncio.gather(*(ask() for _ in range(20)))
    output, _ = await shown
    assert top.returncode == 0, output
    found = json.loads(output)
    assert (found["service"]["state"], found["service"]["restarted"], found["load"]["max_running"]) == (
        "ready",
        False,
        8,
    )
    assert found["load"]["generation_tokens_per_second"] > 0
    assert 0 < found["latency"]["first_token_p50"] <= found["latency"]["first_token_p99"]
    assert found["latency"]["inter_token_p95"] > 0
    assert found["requests"]["200"] > 0
    assert 0 < found["memory"]["active"] <= found["memory"]["peak"]
    assert found["memory"]["resident"] > found["memory"]["active"]
    assert found["consumers"][0]["tenant"] == "key:development"
    assert found["consumers"][0]["completion_tokens"] > 0


async def test_while_the_public_port_is_flooded_the_operator_has_answers(flooded: Running) -> None:
    began: asyncio.Queue[None] = asyncio.Queue()
    http = httpx.AsyncClient(base_url=operators(flooded), headers=development_key(flooded), timeout=30)
    idle = {path: await asked(http, path) for path in ("/livez", "/metrics")}
    clients = [asyncio.create_task(stream(flooded, began)) for _ in range(STREAMS)]
    for _ in range(8):  # as many as run at a time; the others wait
        await began.get()
    with ExitStack() as stack:
        half_open = [stack.enter_context(socket.create_connection(address(flooded.url))) for _ in range(HALF_OPEN)]
        for wire in half_open:
            wire.settimeout(0)
            try:
                wire.send(b"GET /livez HTTP/1.1\r\nhost: ")
            except ConnectionError:
                continue  # it was one too many
        took = {path: [await asked(http, path) for _ in range(20)] for path in ("/livez", "/metrics")}
        text = (await http.get("/metrics")).text
    for path, seconds in took.items():
        print(
            f"\n{path} on the operator's port: {1000 * idle[path]:.1f} ms idle; with {STREAMS} streams and {HALF_OPEN} "
            f"half-open connections on the public one median {1000 * statistics.median(seconds):.1f} ms, "
            f"slowest {1000 * max(seconds):.1f} ms"
        )
    assert max(max(seconds) for seconds in took.values()) < PATIENCE
    turned_away = re.search(r'mlxd_http_refused_total\{reason="too_many_connections"\} (\d+)', text)
    assert turned_away is not None
    open_files = re.search(r"^process_open_fds (\d+)", text, re.MULTILINE)
    assert open_files is not None
    assert int(open_files[1]) < CONNECTIONS + RESERVED_FILES
    assert int(turned_away[1]) >= STREAMS + HALF_OPEN - CONNECTIONS
    print(f"turned away: {turned_away[1]}; open files: {open_files[1]}")
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    await http.aclose()


async def test_while_it_drains_the_operator_is_told_so_until_the_last_answer_is_out(flooded: Running) -> None:
    began: asyncio.Queue[None] = asyncio.Queue()
    url = operators(flooded)
    await reachable(flooded.url)
    client = asyncio.create_task(stream(flooded, began))
    await asyncio.wait_for(began.get(), 30)
    os.kill(flooded.pid, signal.SIGTERM)
    async with httpx.AsyncClient(base_url=url, headers=development_key(flooded)) as http:
        async with asyncio.timeout(10):
            while (answer := await http.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.01)
        assert answer.json()["state"] == "draining"
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
    await asyncio.wait_for(client, 60)
    await asyncio.to_thread(os.waitid, os.P_PID, flooded.pid, os.WEXITED | os.WNOWAIT)  # its exit code is the fixture's
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address(url))
