"""`GET /admin/status` over fakes: exact, without a wait, and nothing in it that is anybody's."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service import __version__
from service.auth.jwt import Issuer
from service.engine.engine import EngineState
from service.observability.logging import current_level
from service.observability.token_rate import TokensPerSecond
from service.supervision.policy import Verdict
from service.supervision.start import Start
from service.supervision.starts import StartLedger
from tests.fakes_api import Client, Service

pytestmark = pytest.mark.anyio


async def told(service: Service) -> Any:
    answer = await Client(service).get("/admin/status")
    assert answer.status == 200
    return answer.json()


async def test_it_tells_state_load_and_memory() -> None:
    service = Service()
    service.engine.running, service.engine.waiting = 2, 5
    service.metrics.rows_capacity.set(32)
    service.metrics.queue_capacity.set(256)
    found = await told(service)
    assert found == {
        "ready": True,
        "state": "ready",
        "reasons": [],
        "version": __version__,
        "started_at": 1_700_000_000,
        "uptime_seconds": 0.5,
        "log_level": current_level(),
        "start": {"supervised": False, "safe_mode": None, "died_recently": 0},
        "model": {
            "name": "org/model",
            "loaded": True,
            "device": "cpu",
            "context_length": 2048,
            "batching": True,
        },
        "drain": None,
        "reload": None,
        "requests": {
            "in_flight": 1,
            "running": 2,
            "max_running": 32,
            "waiting": 5,
            "max_waiting": 256,
            "held": found["requests"]["held"],
        },
        "tokens_per_second": None,
        "step_age_seconds": 0.25,
        "progress_age_seconds": None,
        "event_loop_age_seconds": 0.0,
        "memory": {
            "active": 10,
            "peak": 20,
            "buffer_cache": 3,
            "recommended": None,
            "reserved": found["memory"]["reserved"],
            "budget": found["memory"]["budget"],
        },
        "prefix_cache": {"bytes": 4, "capacity_bytes": found["prefix_cache"]["capacity_bytes"], "entries": 1},
        "limits": {"open_reservations": 0},
        "storage": None,
        "issuers": [],
        "redis": None,
    }


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.DRAINING, EngineState.FAILED])
async def test_it_answers_in_every_state_with_the_reasons_of_readyz(state: EngineState) -> None:
    service = Service()
    service.engine.state, service.engine.detail = state, "because"
    if state is EngineState.STARTING:
        service.engine.info = None
    found = await told(service)
    assert (found["ready"], found["state"], found["reasons"]) == (
        False,
        state.value,
        [f"the engine is {state.value}", "because"],
    )
    assert (found["model"] is None) is (state is EngineState.STARTING)
    if state is EngineState.FAILED:
        assert found["model"]["loaded"] is False


async def test_it_tells_how_many_tokens_a_second_there_were() -> None:
    service = Service()
    client = Client(service)
    rate = SimpleNamespace(per_second=lambda: TokensPerSecond(prompt=100.0, generation=25.5, seconds=10.0))
    exchange = client.exchange("GET", "/admin/status")
    exchange.scope["state"]["token_rate"] = rate
    exchange.push()
    await exchange.run()
    assert exchange.answer.json()["tokens_per_second"] == {"prompt": 100.0, "generation": 25.5, "seconds": 10.0}


@dataclass
class Health:
    keys: int
    skipped: int
    age: float | None
    error: str | None


async def test_it_tells_how_what_the_service_leans_on_is() -> None:
    service = Service()
    settings = SimpleNamespace(name="corp")
    issuer = cast("Issuer", SimpleNamespace(settings=settings, keys=SimpleNamespace(health=Health(2, 0, 7.5, "late"))))
    control = replace(service.access, storage_up=lambda: False, issuers=(issuer,))
    service.limits._store = cast("Any", SimpleNamespace(up=False))
    service.metrics.usage_rows_pending.set_function(lambda: 12)
    client = Client(service)
    exchange = client.exchange("GET", "/admin/status")
    exchange.scope["state"]["access"] = control
    exchange.push()
    await exchange.run()
    found = exchange.answer.json()
    assert found["storage"] == {"up": False, "usage_rows_pending": 12}
    assert found["issuers"] == [{"name": "corp", "keys": 2, "age_seconds": 7.5, "error": "late"}]
    assert found["redis"] == {"up": False}


async def test_it_tells_of_safe_mode_and_of_starts_that_died(tmp_path: Path) -> None:
    service = Service()
    verdict = Verdict(safe_mode="3 starts died within an hour", deaths=(1_700_000_000.0, 1_699_990_000.0))
    client = Client(service)
    exchange = client.exchange("GET", "/admin/status")
    exchange.scope["state"]["start"] = Start(service.settings, StartLedger(tmp_path), verdict)
    exchange.push()
    await exchange.run()
    assert exchange.answer.json()["start"] == {
        "supervised": True,
        "safe_mode": "3 starts died within an hour",
        "died_recently": 1,
    }


async def test_it_is_small_whatever_goes_on() -> None:
    service = Service()
    service.engine.waiting = 10**6
    for number in range(1000):
        service.metrics.http_requests.labels(f"/r{number}", "GET", "200").inc()
    assert len(json.dumps(await told(service))) < 2000
