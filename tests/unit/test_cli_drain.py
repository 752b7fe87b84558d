"""`mlxd service drain` and `undrain` against an application over fakes: what is printed, and the exit codes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service.cli import commands
from service.cli.drain import drained
from service.cli.reach import AdminApi, Unanswered
from service.settings import Settings
from tests.fakes_api import Service
from tests.server_api import serving_in_thread

URL = "http://127.0.0.1:8001"


@pytest.fixture
def service() -> Service:
    return Service(settings=Settings.load(None, {"auth.enabled": False, "engine.drain_timeout": 0.0}))


@pytest.fixture
def run(service: Service, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    config = tmp_path / "mlxd.toml"
    config.write_text(f'[server]\nstate_dir = "{tmp_path}"\n[engine]\ndrain_timeout = 0.0\n')
    with serving_in_thread(service) as url:
        yield lambda *command: CliRunner().invoke(
            commands(), ["--config", str(config), "service", *command, "--url", url]
        )


def said(result: Any) -> list[str]:
    """Without what the service, in the same process, logs beside."""
    return [line for line in result.output.splitlines() if line.startswith("mlxd: ")]


def test_it_says_when_it_is_drained_and_takes_work_again(run: Callable[..., Any], service: Service) -> None:
    done = run("drain")
    assert (done.exit_code, said(done)) == (
        0,
        ["mlxd: drained; takes work again after a restart, or: mlxd service undrain"],
    )
    assert service.engine.drain_for_good is False
    back = run("undrain")
    assert (back.exit_code, said(back)) == (0, ["mlxd: ready"])
    assert service.engine.drain_for_good is None


def test_it_only_begins_where_it_is_not_to_wait(run: Callable[..., Any], service: Service) -> None:
    service.engine.running = 3
    begun = run("drain", "--no-wait")
    assert (begun.exit_code, said(begun)) == (0, ["mlxd: draining; 3 running"])


def test_one_that_a_signal_began_is_not_undone_and_the_refusal_is_told(
    run: Callable[..., Any], service: Service
) -> None:
    service.engine.begin_drain(1, for_good=True)
    refused = run("undrain")
    assert refused.exit_code == os.EX_UNAVAILABLE
    assert "The service is shutting down. (503)" in refused.output


def test_a_service_that_is_not_there_is_one_line_and_69(tmp_path: Path) -> None:
    config = tmp_path / "mlxd.toml"
    config.write_text(f'[server]\nstate_dir = "{tmp_path}"\n')
    for url, code in (("http://127.0.0.1:1", os.EX_UNAVAILABLE), ("http://x:y", 2)):
        found = CliRunner().invoke(commands(), ["--config", str(config), "service", "drain", "--url", url])
        assert found.exit_code == code
        assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("states", "expected", "looks"),
    [
        ([{"drained": False}, {"drained": True}], True, 2),
        ([{"drained": False}, None], False, 2),
        ([{"drained": False}] * 9, False, 4),
    ],
)
def test_it_waits_for_the_end_a_while(states: list[Any], expected: bool, looks: int) -> None:
    asked: list[str] = []
    now = [0.0]

    def call(method: str, path: str) -> dict[str, Any]:
        asked.append(f"{method} {path}")
        return {"drain": states[len(asked) - 1]}

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert drained(call, 1.0, clock=lambda: now[0], sleep=sleep) is expected
    assert asked == ["GET /admin/status"] * looks


def test_an_operator_who_took_it_back_meanwhile_is_told_and_1(
    run: Callable[..., Any], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.drain.drained", lambda *_: False)
    service.engine.running = 1
    found = run("drain")
    assert (found.exit_code, found.output.splitlines()[-1]) == (1, "mlxd: not drained in time, or taken back")


@contextmanager
def answering(status: int, body: Any) -> Iterator[AdminApi]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(status, content=content)

    api = AdminApi(URL, "mlxd_key", transport=httpx.MockTransport(answer))
    yield api
    api.close()
    assert seen == ["Bearer mlxd_key"]


@pytest.mark.parametrize(
    ("status", "body", "for_good", "said"),
    [
        (401, {"error": {"message": "x"}}, True, "--key-file"),
        (403, {"error": {"message": "x"}}, True, "scope `admin`"),
        (429, {"error": {"message": "Too many."}}, False, "Too many. (429)"),
        (503, {"error": {"message": "Later."}}, False, "Later. (503)"),
        (404, {"error": 3}, True, "refused (404)"),
        (200, b"<html>", True, "is it mlxd?"),
        (200, [], True, "is it mlxd?"),
    ],
)
def test_what_is_no_answer_says_why_and_whether_to_ask_again(status: int, body: Any, for_good: bool, said: str) -> None:
    with answering(status, body) as api:
        with pytest.raises(Unanswered) as raised:
            api.call("GET", "/admin/status")
        assert (said in str(raised.value), raised.value.for_good) == (True, for_good)
