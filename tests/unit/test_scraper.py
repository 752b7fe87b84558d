"""What a scrape reads, how it is shared, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from service.api import scraper as module
from service.api.scraper import Scraper
from service.auth.access_control import AccessService
from service.engine.engine import Engine, EngineState
from service.engine.generation import GenerationRequest
from service.engine.telemetry import Telemetry
from service.limits.limiter import Limits
from service.observability.exposition import OPENMETRICS, TEXT
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.fakes import MEMORY, FakeBackend
from tests.fakes_api import Client, FakeInfo, Service
from tests.serving import make_key, opened
from tests.token_authority import key_set, rsa_jwk, rsa_key

pytestmark = pytest.mark.anyio


class Held:
    """Holds every rendering up until it is let go, at the reading of a gauge."""

    def __init__(self, metrics: Metrics) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.threads: list[int] = []
        metrics.usage_rows_pending.set_function(self)

    def __call__(self) -> float:
        self.threads.append(threading.get_ident())
        self.begun.release()
        assert self.go.acquire(timeout=10)
        return float(len(self.threads))


def pending(text: bytes) -> str:
    return next(line for line in text.decode().splitlines() if line.startswith("mlxd_usage_rows_pending ")).split()[1]


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def held(service: Service) -> Iterator[Held]:
    found = Held(service.metrics)
    yield found
    found.go.release(100)


def scraper_of(service: Service) -> Scraper:
    return Scraper(
        service.settings,
        service.metrics,
        engine=cast("Engine", service.engine),
        limits=service.limits,
        access=service.access,
    )


async def begun(held: Held) -> None:
    assert await asyncio.to_thread(held.begun.acquire, timeout=10)


# Sharing --------------------------------------------------------------------------------------------------------


async def test_scrapes_at_the_same_time_share_one_rendering_off_the_event_loop(service: Service, held: Held) -> None:
    scraper = scraper_of(service)
    first = asyncio.create_task(scraper.scrape(TEXT))
    await begun(held)
    others = [asyncio.create_task(scraper.scrape(TEXT)) for _ in range(10)]
    await asyncio.sleep(0)
    held.go.release()
    assert {pending(text) for text in await asyncio.gather(first, *others)} == {"1.0"}
    assert threading.get_ident() not in held.threads
    held.go.release()
    assert pending(await scraper.scrape(TEXT)) == "2.0"  # who comes later gets a new one


async def test_each_form_is_rendered_for_itself(service: Service, held: Held) -> None:
    scraper = scraper_of(service)
    held.go.release(2)
    text, openmetrics = await asyncio.gather(scraper.scrape(TEXT), scraper.scrape(OPENMETRICS))
    assert len(held.threads) == 2
    assert openmetrics.endswith(b"# EOF\n")
    assert b"EOF" not in text


async def test_a_client_that_leaves_does_not_take_the_answer_from_the_others(service: Service, held: Held) -> None:
    scraper = scraper_of(service)
    leaves = asyncio.create_task(scraper.scrape(TEXT))
    await begun(held)
    stays = asyncio.create_task(scraper.scrape(TEXT))
    await asyncio.sleep(0)
    leaves.cancel()
    held.go.release()
    assert pending(await stays) == "1.0"
    assert leaves.cancelled()


# What is read ---------------------------------------------------------------------------------------------------


async def scraped(service: Service) -> Metrics:
    assert (await Client(service).get("/metrics")).status == 200
    return service.metrics


async def test_what_runs_is_in_the_labels_of_build_info(service: Service) -> None:
    service.engine.info = None
    labels = {**build_labels(await scraped(service))}
    assert (labels["model"], labels["device"]) == ("", "")
    service.engine.info = FakeInfo()
    labels = build_labels(await scraped(service))
    assert (labels["model"], labels["device"]) == ("org/model", "cpu")
    assert all(labels[name] for name in ("version", "python", "mlx", "mlx_lm"))


def build_labels(metrics: Metrics) -> dict[str, str]:
    [family] = metrics.build_info.collect()
    [sample] = family.samples
    assert sample.value == 1
    return sample.labels


async def test_free_bytes_of_the_state_s_volume_are_absent_where_there_is_none(tmp_path: Path) -> None:
    here = Service(Settings.load(None, {"server.state_dir": tmp_path}))
    free = (await scraped(here)).registry.get_sample_value("mlxd_state_disk_free_bytes")
    found = os.statvfs(tmp_path)
    assert free == pytest.approx(found.f_bavail * found.f_frsize, rel=0.2)
    nowhere = Service(Settings.load(None, {"server.state_dir": tmp_path / "not" / "there"}))
    assert (await scraped(nowhere)).registry.get_sample_value("mlxd_state_disk_free_bytes") is None


async def test_lines_that_the_log_has_dropped_are_counted_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = iter([2, 2, 5, 0, 1])  # a log that is configured anew begins again
    monkeypatch.setattr(module, "lines_dropped", lambda: next(dropped))
    counted = []
    client = Client(service)
    for _ in range(5):
        await client.get("/metrics")
        counted.append(service.count("mlxd_log_lines_dropped_total"))
    assert counted == [2, 2, 5, 5, 6]


async def test_vllm_s_names_are_there_where_they_are_wanted_and_a_model_is_loaded() -> None:
    aliased = Service(Settings.load(None, {"metrics.vllm_aliases": True}))
    aliased.engine.running = 3
    text = (await Client(aliased).get("/metrics")).body
    assert b'vllm:num_requests_running{engine="0",model_name="org/model"} 3.0' in text
    aliased.engine.info = None
    assert b"vllm:" not in (await Client(aliased).get("/metrics")).body
    assert b"vllm:" not in (await Client(Service()).get("/metrics")).body


async def test_a_client_that_names_openmetrics_gets_it(service: Service) -> None:
    client = Client(service)
    exchange = client.exchange("GET", "/metrics", [("accept", "application/openmetrics-text;version=1.0.0")])
    exchange.push()
    await exchange.run()
    assert exchange.answer.headers["content-type"] == OPENMETRICS
    assert exchange.answer.body.endswith(b"# EOF\n")


# Of the real parts ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def engine_of(backend: FakeBackend, metrics: Metrics, settings: Settings) -> AsyncIterator[Engine]:
    engine = Engine(backend, settings.engine, telemetry=Telemetry(metrics))
    await engine.start()
    await engine.wait(EngineState.READY)
    try:
        yield engine
    finally:
        assert backend.gate is not None
        backend.gate.release(1000)
        await engine.stop()


async def test_rows_held_and_bytes_reserved_are_those_of_the_books(service: Service) -> None:
    metrics, backend = service.metrics, FakeBackend(gate=threading.Semaphore(0))
    settings = Settings.load(None, {"engine.max_rows": 2})

    def read() -> dict[str, float | None]:
        reader.read()
        names = ("rows_held", "num_requests_running", "num_requests_waiting", "memory_reserved_bytes")
        return {name: metrics.registry.get_sample_value(f"mlxd_{name}") for name in names}

    async with engine_of(backend, metrics, settings) as engine:
        reader = Scraper(settings, metrics, engine=engine, limits=service.limits, access=service.access)
        asked = GenerationRequest(request_id="r", prompt=(5,) * 10, max_tokens=20)
        generations = engine.submit([asked] * 3)
        await asyncio.to_thread(backend.inserted.wait, 10)
        while engine.status().running < 2:
            await asyncio.sleep(0)
        reserved = MEMORY.peak_bytes([30, 30])
        assert read() == {
            "rows_held": 3,
            "num_requests_running": 2,
            "num_requests_waiting": 1,
            "memory_reserved_bytes": reserved,
        }
        assert metrics.registry.get_sample_value("mlxd_memory_budget_bytes") == MEMORY.budget
        assert metrics.registry.get_sample_value("mlxd_kv_cache_usage_perc") == reserved / MEMORY.budget
        for generation in generations:
            generation.close()
        backend.gate.release(1000) if backend.gate else None
        while engine.status().held:
            await asyncio.sleep(0)
        assert set(read().values()) == {0}
        assert metrics.registry.get_sample_value("mlxd_model_load_seconds") is not None


async def test_the_device_s_recommendation_is_absent_where_there_is_none(service: Service) -> None:
    name = "mlxd_memory_recommended_bytes"
    assert (await scraped(service)).registry.get_sample_value(name) is None
    status = service.engine.status()
    known = replace(status, memory=replace(status.memory, recommended=1 << 34, prefix_capacity=7))
    service.engine.status = lambda: known  # type: ignore[method-assign]
    metrics = await scraped(service)
    assert metrics.registry.get_sample_value(name) == 1 << 34
    assert metrics.registry.get_sample_value("mlxd_prefix_cache_capacity_bytes") == 7


async def test_storage_and_issuers_are_as_they_are_now(tmp_path: Path) -> None:
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(key_set(rsa_jwk(rsa_key(), kid="a"), rsa_jwk(rsa_key(1), kid="b")))
    issuer: dict[str, Any] = {
        "issuer": "https://acme.test/",
        "audience": "mlxd",
        "algorithms": ["RS256"],
    }
    settings = Settings.load(
        None,
        {
            "server.state_dir": tmp_path / "state",
            "auth.issuers": [
                {"name": "acme", "jwks_file": jwks, **issuer},
                {"name": "gone", "jwks_file": tmp_path / "nowhere", **issuer, "issuer": "https://gone.test/"},
            ],
        },
    )
    make_key(settings, "models")
    metrics = Metrics()
    access, service = AccessService(settings, metrics), Service()
    limits = Limits(settings, metrics, access.control.storage)
    reader = Scraper(settings, metrics, engine=cast("Engine", service.engine), limits=limits, access=access.control)
    reader.read()
    assert metrics.registry.get_sample_value("mlxd_storage_up") == 0
    assert metrics.registry.get_sample_value("mlxd_jwks_keys", {"issuer": "acme"}) == 0
    async with opened(access):
        async with asyncio.timeout(10):
            while (
                metrics.registry.get_sample_value("mlxd_jwks_keys", {"issuer": "acme"}) != 2
                or metrics.registry.get_sample_value("mlxd_storage_up") != 1
            ):
                await asyncio.sleep(0.005)
                reader.read()
        age = metrics.registry.get_sample_value("mlxd_jwks_age_seconds", {"issuer": "acme"})
        assert age is not None
        assert 0 <= age < 60
        assert metrics.registry.get_sample_value("mlxd_jwks_age_seconds", {"issuer": "gone"}) is None
        looks = {
            (sample.labels["issuer"], sample.labels["outcome"])
            for family in metrics.jwks_refreshes.collect()
            for sample in family.samples
        }
        assert looks == {("acme", "success"), ("gone", "failure")}


async def test_without_authentication_there_is_no_storage_to_be_up(service: Service) -> None:
    assert (await scraped(service)).registry.get_sample_value("mlxd_storage_up") is None
