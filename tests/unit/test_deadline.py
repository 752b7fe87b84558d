"""`x-request-timeout`: the same on every inference route, never ignored, never beyond the plan or the service."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.generation import Delta
from service.errors import DeadlineTooShort, DeadlineUnreachable
from service.settings import ConfigurationError, PlanSettings, Settings
from tests.fakes import FakeBackend
from tests.fakes_api import DONE, Answer, Client, FakeInference, Service
from tests.serving import Served, served

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "x"}),
    ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/completions", {"model": "default", "prompt": "x"}),
]
ROUTE = pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])


def client() -> Client:
    return Client(Service(inference=FakeInference([Delta("ok"), DONE])))


async def post(found: Client, path: str, body: dict[str, Any], *given: str) -> Answer:
    headers = [("content-type", "application/json"), *(("x-request-timeout", value) for value in given)]
    return await found.request("POST", path, json.dumps(body).encode(), headers)


@ROUTE
@pytest.mark.parametrize(
    ("given", "seconds"), [("30", 30.0), ("2.5", 2.5), ("0.001", 0.001), ("007", 7.0), ("999999999", 999_999_999.0)]
)
async def test_a_positive_decimal_number_reaches_the_engine(
    path: str, body: dict[str, Any], given: str, seconds: float
) -> None:
    found = client()
    assert (await post(found, path, body, given)).status == 200
    assert found.service.inference.asks[0].timeout == seconds


@ROUTE
async def test_without_the_header_the_client_asks_for_nothing(path: str, body: dict[str, Any]) -> None:
    found = client()
    assert (await post(found, path, body)).status == 200
    assert found.service.inference.asks[0].timeout is None


@ROUTE
@pytest.mark.parametrize(
    "given",
    [
        *("", "0", "0.0", "0.000", "-1", "-0.5", "+1", "inf", "-inf", "Infinity", "nan", "NaN", "1e3", "1_0", "0x10"),
        *("5s", "5 s", " ", "1,5", ".5", "5.", "1.2.3", "five", "1, 2", "9" * 10, "9" * 5000, "0." + "1" * 10, "٣"),
    ],
)
async def test_anything_else_is_refused_by_name(path: str, body: dict[str, Any], given: str) -> None:
    found = client()
    answer = await post(found, path, body, given)
    assert answer.status == 400
    assert (answer.error["code"], answer.error["param"]) == ("invalid_value", "x-request-timeout")
    assert len(answer.error["message"]) < 120, "it does not repeat what was sent"
    assert found.service.inference.asks == []


@ROUTE
async def test_given_twice_it_is_refused_even_when_equal(path: str, body: dict[str, Any]) -> None:
    assert (await post(client(), path, body, "5", "5")).status == 400


async def test_the_openapi_document_knows_the_header() -> None:
    schema = (await client().get("/openapi.json")).json()
    for path, _ in ROUTES:
        [parameter] = schema["paths"][path]["post"]["parameters"]
        assert (parameter["name"], parameter["in"], parameter["required"]) == ("x-request-timeout", "header", False)
        assert "Seconds" in parameter["description"]


# -- the caps -------------------------------------------------------------------------------------------------


def granted(tmp_path: Path, given: str | None, **options: Any) -> float:
    """Seconds that a request may really take, in a whole service that does not get to it."""
    gate = threading.Semaphore(0)
    settings = Settings.load(None, {"server.state_dir": tmp_path, "server.port": 0, "auth.enabled": False, **options})
    with served(settings, FakeBackend(gate=gate)) as service, ThreadPoolExecutor(1) as pool:
        headers = {} if given is None else {"x-request-timeout": given}
        answer = pool.submit(httpx.post, f"{service.url}/generate", json={"prompt": "x"}, headers=headers, timeout=60)
        while not (live := list(service.app.engine._live)):
            assert not answer.done(), answer.result().text
        gate.release(1000)
        assert answer.result().status_code == 200
        return _seconds(service, live[0].request.deadline, live[0].meter.submitted_at)


def _seconds(service: Served, deadline: float | None, submitted: float) -> float:
    assert deadline is not None
    assert service.app.engine.clock() > submitted
    return deadline - submitted


@pytest.mark.parametrize(
    ("given", "plan", "engine", "seconds"),
    [
        (None, None, None, 600),
        ("30", None, None, 30),
        ("700", None, None, 600),
        (None, 40, None, 40),
        ("50", 40, None, 40),
        ("999999999", 7200, 500, 500),
        ("20", 40, 30, 20),
    ],
)
def test_the_shortest_of_client_plan_and_service_holds(
    tmp_path: Path, given: str | None, plan: int | None, engine: int | None, seconds: float
) -> None:
    options: dict[str, Any] = {}
    if plan is not None:
        options["limits.plans"] = {"default": {"request_timeout": plan}}
    if engine is not None:
        options["engine.request_timeout"] = engine
    # What tokenising took was the request's time too.
    assert seconds - 5 < granted(tmp_path, given, **options) <= seconds


@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), float("inf"), True, False, None, "", "none", 86_401])
def test_a_plan_s_timeout_is_a_positive_number_of_seconds(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"limits\.plans\.gold\.request_timeout"):
        Settings.load(None, {"limits.plans": {"gold": {"request_timeout": value}}})


def test_a_plan_without_one_has_an_hour() -> None:
    assert PlanSettings().request_timeout == 3600


# -- on the wire ----------------------------------------------------------------------------------------------


@ROUTE
async def test_who_cannot_begin_in_time_is_told_when_it_could(path: str, body: dict[str, Any]) -> None:
    found = client()
    found.service.inference.refusal = DeadlineUnreachable("too busy", retry_after=6.2)
    answer = await post(found, path, body, "5")
    assert (answer.status, answer.error["code"]) == (503, "deadline_unreachable")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("7", "6200")
    assert answer.headers["x-should-retry"] == "true"


@ROUTE
async def test_a_prompt_too_long_for_its_deadline_is_not_to_be_tried_again(path: str, body: dict[str, Any]) -> None:
    found = client()
    found.service.inference.refusal = DeadlineTooShort("too long")
    answer = await post(found, path, body, "5")
    assert (answer.status, answer.error["code"]) == (400, "deadline_too_short")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
