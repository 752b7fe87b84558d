"""`/admin/drain` over fakes: what it answers when, who may, and what it leaves behind."""

from typing import Any

import pytest

from service.engine.engine import EngineState
from service.settings import Settings
from tests.fakes_api import Client, Service

pytestmark = pytest.mark.anyio

PATH = "/admin/drain"


def open_service() -> Service:
    """Without authentication, and so without an audit log."""
    return Service(settings=Settings.load(None, {"auth.enabled": False}))


async def test_it_is_202_while_rows_run_then_200_and_the_same_however_often_it_is_asked() -> None:
    service = open_service()
    service.engine.running = 2
    client = Client(service)
    answers = [await client.request("POST", PATH) for _ in range(2)]
    told = {"state": "draining", "drained": False, "running": 2, "waiting": 0}
    assert [(answer.status, answer.json()) for answer in answers] == [(202, told)] * 2
    service.engine.running = 0
    answer = await client.request("POST", PATH)
    assert (answer.status, answer.json()) == (200, {**told, "drained": True, "running": 0})
    assert (await client.get("/admin/status")).json()["drain"] == {"drained": True, "for_good": False}
    ready = await client.get("/readyz")
    assert (ready.status, ready.json()["state"]) == (503, "draining")


async def test_it_is_not_drained_before_what_requests_held_is_settled() -> None:
    service = open_service()
    principal: Any = type("P", (), {"id": "x", "plan": "default", "limits": {}})()
    held = await service.limits.reserve(principal, service.limits.plan_of(principal), 10, told=lambda _: None)
    assert (await Client(service).request("POST", PATH)).status == 202
    held.settle(10)
    assert (await Client(service).request("POST", PATH)).status == 200


async def test_delete_takes_work_again_and_is_harmless_where_nothing_drains() -> None:
    service = open_service()
    client = Client(service)
    for _ in range(2):
        answer = await client.request("DELETE", PATH)
        assert (answer.status, answer.json()) == (
            200,
            {"state": "ready", "drained": False, "running": 0, "waiting": 0},
        )
        await client.request("POST", PATH)
    assert service.engine.state is EngineState.DRAINING


async def test_what_a_signal_has_begun_is_not_undone() -> None:
    service = open_service()
    service.engine.begin_drain(1, for_good=True)
    answer = await Client(service).request("DELETE", PATH)
    assert (answer.status, answer.error["code"]) == (503, "draining")
    assert service.engine.state is EngineState.DRAINING


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_what_cannot_be_audited_is_not_done(method: str) -> None:
    service = Service()  # whose database is never there
    if method == "DELETE":
        service.engine.begin_drain(1, for_good=False)
    before = service.engine.state
    assert (await Client(service).request(method, PATH)).status == 503
    assert service.engine.state is before
