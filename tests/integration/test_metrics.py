"""Metrics over real sockets: they add up with the ledger and with what clients were told, and cost next to nothing."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from service.auth.api_keys import IssuedKey
from service.engine.backend import Backend
from service.engine.generation import FinishReason
from service.engine.telemetry import Telemetry
from service.observability.metrics import Metrics
from service.observability.request_metrics import RequestMetrics
from service.settings import Settings
from service.storage.database import Database
from service.storage.schema import USAGE
from tests.fakes import FakeBackend
from tests.serving import AMPLE, BRIEF_CHUNK, Served, bearer, make_key, served, started
from tests.unit.test_request_metrics import record

pytestmark = pytest.mark.anyio

Totals = dict[tuple[str, ...], float]


async def scrape(http: httpx.AsyncClient, url: str, **more: Any) -> Totals:
    """Every sample by its name and label values, in the order of the labels' names."""
    answer = await http.get(f"{url}/metrics", **more)
    answer.raise_for_status()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


# They add up ----------------------------------------------------------------------------------------------------

REQUESTS = 240
AT_ONCE = 16


@dataclass
class Told:
    """What a client learnt of its request. `usage` only where the answer ended as it should."""

    kind: str
    rows: int = 1
    status: int = 0
    received: int = 0
    usage: Mapping[str, Any] | None = None
    error: str | None = None

    def read(self, event: Any) -> None:
        if event == "[DONE]":
            return
        if "error" in event:
            self.error = event["error"]["code"]
        self.received += len(event.get("text") or "")
        for choice in event.get("choices", ()):
            self.received += len(choice.get("text") or choice.get("delta", {}).get("content") or "")
        self.usage = event.get("usage") or self.usage


@dataclass
class Crowd:
    """Clients of every kind, by chance: `told` by request id."""

    http: httpx.AsyncClient
    keys: list[IssuedKey]
    chance: random.Random = field(default_factory=lambda: random.Random(5))
    told: dict[str, Told] = field(default_factory=dict)

    @property
    def _troubled(self) -> tuple[Callable[[str], Any], ...]:
        return self.leaves, self.gives_up, self.hurried, self.refused

    async def run(self) -> None:
        kinds = (self.whole, self.streamed, self.native, self.chat, *self._troubled)
        places = asyncio.Semaphore(AT_ONCE)

        async def one(number: int, kind: Callable[[str], Any]) -> None:
            async with places:
                await kind(f"mixed-{number}")

        # Each of the kinds, and chance for the order.
        chosen = [kinds[number % len(kinds)] for number in range(REQUESTS)]
        self.chance.shuffle(chosen)
        await asyncio.gather(*(one(number, kind) for number, kind in enumerate(chosen)))
        # More at once than can run and wait, whatever the machine: some are refused.
        await asyncio.gather(*(self.long(f"burst-{number}") for number in range(3 * AT_ONCE)))

    def headers(self, request_id: str, **more: str) -> dict[str, str]:
        return {**bearer(self.chance.choice(self.keys)), "x-request-id": request_id, **more}

    def body(self, **more: Any) -> dict[str, Any]:
        prompt = "ab" * self.chance.randrange(1, 40)
        return {"prompt": prompt, "max_tokens": self.chance.randrange(1, 60), "temperature": 0, **more}

    async def _post(self, path: str, body: dict[str, Any], told: Told, headers: dict[str, str]) -> None:
        answer = await self.http.post(path, json=body, headers=headers)
        told.status = answer.status_code
        told.read(answer.json())

    async def _stream(
        self, path: str, body: dict[str, Any], told: Told, headers: dict[str, str], most: int = 10**9
    ) -> None:
        """Read `most` events, then leave."""
        async with self.http.stream("POST", path, json={**body, "stream": True}, headers=headers) as answer:
            told.status = answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    told.read(data if data == "[DONE]" else json.loads(data))
                    most -= 1
                if not most:
                    return

    def _new(self, request_id: str, kind: str, rows: int = 1) -> Told:
        found = self.told[request_id] = Told(kind, rows)
        return found

    async def whole(self, request_id: str) -> None:
        rows = self.chance.randrange(1, 4)
        told = self._new(request_id, "whole", rows)
        await self._post("/v1/completions", self.body(n=rows), told, self.headers(request_id))

    async def streamed(self, request_id: str) -> None:
        rows = self.chance.randrange(1, 3)
        told = self._new(request_id, "streamed", rows)
        body = self.body(n=rows, stream_options={"include_usage": True})
        await self._stream("/v1/completions", body, told, self.headers(request_id))

    async def chat(self, request_id: str) -> None:
        body = self.body()
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        await self._post("/v1/chat/completions", body, self._new(request_id, "chat"), self.headers(request_id))

    async def native(self, request_id: str) -> None:
        send = self._stream if self.chance.random() < 0.5 else self._post
        await send("/generate", self.body(), self._new(request_id, "native"), self.headers(request_id))

    async def long(self, request_id: str) -> None:
        told = self._new(request_id, "long")
        await self._post("/generate", self.body(max_tokens=200), told, self.headers(request_id))

    async def leaves(self, request_id: str) -> None:
        rows = self.chance.randrange(1, 3)
        told = self._new(request_id, "leaves", rows)
        body = self.body(max_tokens=1000, n=rows)
        await self._stream("/v1/completions", body, told, self.headers(request_id), most=self.chance.randrange(1, 8))

    async def gives_up(self, request_id: str) -> None:
        told = self._new(request_id, "gives_up")
        try:
            async with asyncio.timeout(self.chance.uniform(0.001, 0.1)):
                await self._post("/generate", self.body(max_tokens=1000), told, self.headers(request_id))
        except TimeoutError:
            told.usage = None

    async def hurried(self, request_id: str) -> None:
        told = self._new(request_id, "hurried")
        headers = self.headers(request_id, **{"x-request-timeout": f"{self.chance.uniform(0.005, 0.2):.3f}"})
        await self._post("/generate", self.body(max_tokens=1000), told, headers)

    async def refused(self, request_id: str) -> None:
        told = self._new(request_id, "refused")
        changes: dict[str, Any] = self.chance.choice(
            [{"model": "nobody's"}, {"max_tokens": 10**9}, {"prompt": "a" * 9000}, {"temperature": -1}, {"prompt": ""}]
        )
        await self._post("/v1/completions", self.body(**changes), told, self.headers(request_id))


def troubled() -> FakeBackend:
    """Loses a row now and then, and a whole step sometimes. A step takes a millisecond."""

    def before(number: int) -> None:
        time.sleep(0.001)
        if number % 300 == 0:
            raise RuntimeError("scripted")

    return FakeBackend(before_step=before, failing=lambda row: len(row.prompt) % 13 == 0)


def over_mlx() -> None:
    """The backend that the service makes for itself."""


def ledger(settings: Settings) -> list[Mapping[Any, Any]]:
    with Database.open(settings.storage, settings.server.state_dir) as database:
        found = database.read(lambda connection: connection.execute(sa.select(USAGE)).mappings().all()).result()
    return [dict(row) for row in found]


@asynccontextmanager
async def client(service: Served) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as found:
        yield found


@pytest.mark.parametrize("backend", [over_mlx, troubled])
async def test_counters_add_up_with_the_ledger_and_with_what_clients_were_told(
    backend: Callable[[], Backend | None], tiny_long_model_dir: Path, tmp_path: Path
) -> None:
    settings = Settings.load(
        None,
        {
            **AMPLE,
            "server.port": 0,
            "server.state_dir": tmp_path,
            "model.reference": str(tiny_long_model_dir),
            "engine.max_rows": 8,
            "engine.max_prefill_chunk": BRIEF_CHUNK,
            "engine.max_queue": 20,
        },
    )
    keys = [make_key(settings, "inference", "metrics", tenant=tenant) for tenant in ("acme", "acme", "blue")]
    with served(settings, backend()) as service:
        async with client(service) as http:
            crowd = Crowd(http, keys)
            await crowd.run()
            await service.settled()
            async with asyncio.timeout(20):
                totals = await scrape(http, service.ops_url, headers=bearer(keys[0]))
                while totals["mlxd_usage_rows_pending",] or totals["mlxd_reservations_open",]:
                    await asyncio.sleep(0.05)
                    totals = await scrape(http, service.ops_url, headers=bearer(keys[0]))
    rows = ledger(settings)
    compare_with_ledger(totals, rows)
    compare_with_clients(crowd.told, rows)
    assert totals["mlxd_admission_rejections_total", "queue_full"] > 0
    if backend is over_mlx:
        assert totals["mlxd_prefix_cache_hits_total",] > 0  # the prompts begin alike
    else:
        assert totals["mlxd_internal_errors_total", "worker_step"] > 0
    print(*sorted(Counter(row["finish_reason"] for row in rows).items()))


def compare_with_ledger(totals: Totals, rows: list[Mapping[Any, Any]]) -> None:
    """Metrics and ledger are the same numbers, in the whole and for each key."""
    kinds = {"prompt": "prompt_tokens", "cached": "cached_tokens", "completion": "completion_tokens"}
    sums = {kind: sum(row[column] for row in rows) for kind, column in kinds.items()}
    assert sums["completion"] > 1000
    assert totals["mlxd_prompt_tokens_total",] == sums["prompt"]
    assert totals["mlxd_prompt_tokens_cached_total",] == sums["cached"]
    assert totals["mlxd_generation_tokens_total",] == sums["completion"]
    assert totals["mlxd_prefix_cache_hits_total",] == sums["cached"]
    assert totals["mlxd_request_prompt_tokens_sum",] == sums["prompt"]
    assert totals["mlxd_request_generation_tokens_sum",] == sums["completion"]
    by_key: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        by_key["mlxd_consumer_requests_total", row["key_id"], row["tenant"]] += 1
        for kind, column in kinds.items():
            by_key["mlxd_consumer_tokens_total", row["key_id"], kind, row["tenant"]] += row[column]
    assert {name: value for name, value in totals.items() if name[0].startswith("mlxd_consumer_")} == by_key
    ended = {name: value for name, value in totals.items() if name[0].startswith("mlxd_request_success_total")}
    failed = {name: value for name, value in totals.items() if name[0].startswith("mlxd_request_failure_total")}
    assert sum(ended.values()) + sum(failed.values()) == sum(row["rows"] for row in rows)
    assert totals["mlxd_request_queue_time_seconds_count",] == sum(row["rows"] for row in rows)
    begun = totals["mlxd_request_prompt_tokens_count",]
    firsts = sum(value for name, value in totals.items() if name[0] == "mlxd_request_prefill_time_seconds_count")
    assert totals["mlxd_inter_token_latency_seconds_count",] == sums["completion"] - firsts
    assert firsts <= begun
    assert totals["mlxd_rows_held",] == totals["mlxd_memory_reserved_bytes",] == 0


def compare_with_clients(told: Mapping[str, Told], rows: list[Mapping[Any, Any]]) -> None:
    """Each request is one row of the ledger, or none when it was refused; a row has what its client was told."""
    by_id = {row["request_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    ended = 0
    for request_id, client in told.items():
        row = by_id.pop(request_id, None)
        if row is None:
            assert client.usage is None, client
            assert client.received == 0, client
        elif client.usage is None:
            assert row["completion_tokens"] >= client.received, client
        else:
            ended += 1
            assert client.error is None
            assert row["finish_reason"] in {"stop", "length"}
            assert row["completion_tokens"] == client.usage["completion_tokens"], client
            # On the wire a prompt is told once (OpenAI); what the engine reads is one for each row.
            assert row["prompt_tokens"] == client.rows * client.usage["prompt_tokens"], client
        if client.kind == "refused":
            assert row is None
            assert client.status in {400, 404}, client
    assert not by_id
    assert ended > REQUESTS / 5


# They cost next to nothing --------------------------------------------------------------------------------------

STREAMS = 32
CONSUMERS = 200
SCRAPES = 40


@pytest.mark.alone
async def test_a_scrape_under_full_load_takes_less_than_50_ms(tiny_long_model_dir: Path, tmp_path: Path) -> None:
    """32 streams as fast as they go, 200 consumers with series of their own.

    The best of many: the machine has two cores, and the streams' clients are on it too.
    """
    settings = Settings.load(None, {"server.state_dir": tmp_path})
    keys = [make_key(settings, "inference", "metrics", tenant=f"tenant-{number}") for number in range(CONSUMERS)]
    headers = bearer(keys[0])
    took: list[float] = []
    with started(
        tmp_path,
        timed=True,
        MLXD_MODEL__REFERENCE=str(tiny_long_model_dir),
        MLXD_AUTH__ENABLED="true",
        MLXD_LIMITS__PLANS=json.dumps(AMPLE["limits.plans"]),
    ) as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as http:
            for key in keys:
                body = {"prompt": "ab", "max_tokens": 1}
                (await http.post("/generate", json=body, headers=bearer(key))).raise_for_status()
            streams = [asyncio.create_task(endless(running.url, headers)) for _ in range(STREAMS)]
            async with asyncio.timeout(60):
                while (await scrape(http, running.url, headers=headers))["mlxd_num_requests_running",] < STREAMS:
                    await asyncio.sleep(0.01)
            for _ in range(SCRAPES):
                began = time.perf_counter()
                await http.get("/metrics", headers=headers)
                took.append(time.perf_counter() - began)
            totals = await scrape(http, running.url, headers=headers)
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    assert totals["mlxd_num_requests_running",] == STREAMS
    assert len({name[1:] for name in totals if name[0] == "mlxd_consumer_requests_total"}) == CONSUMERS
    print(
        f"a scrape of {len(totals)} series beside {STREAMS} streams: best {min(took) * 1e3:.1f} ms, "
        f"median {statistics.median(took) * 1e3:.1f} ms, most {max(took) * 1e3:.1f} ms"
    )
    assert min(took) < 0.050


async def endless(url: str, headers: Mapping[str, str]) -> None:
    """A stream that goes on until its client leaves, or for as long as the context does."""
    body = {"prompt": "ab", "max_tokens": 4000, "logit_bias": {"2": -100}, "stream": True}
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{url}/generate", json=body, headers=dict(headers)) as answer,
    ):
        async for _ in answer.aiter_raw():
            pass


ROWS = 32
TOKEN_BUDGET = 10e-6
"""Seconds that logs and metrics together may take for a token."""


def best_of(work: Callable[[], object], *, times: int, tries: int = 7) -> float:
    """Seconds of one call, of the fastest of some series of calls."""
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - began) / times)
    return min(found)


@pytest.mark.alone
def test_a_token_costs_a_small_part_of_its_budget() -> None:
    """What a step of 32 rows counts, by token; and what a request counts when it is over."""
    metrics = Metrics()
    telemetry, observe = Telemetry(metrics), RequestMetrics(metrics, max_consumers=CONSUMERS)

    def step() -> None:
        telemetry.stepped(0.03, ROWS)
        for _ in range(ROWS):
            telemetry.gap(0.03)
        telemetry.decoded(ROWS)

    token = best_of(step, times=200) / ROWS
    whole = best_of(lambda: observe(record()), times=500)
    per_row = best_of(lambda: telemetry.prefill(100, 50), times=500) + best_of(
        lambda: telemetry.ended(FinishReason.STOP), times=500
    )
    print(f"metrics: {token * 1e6:.2f} us a token, {(whole + per_row) * 1e6:.1f} us a request of one row")
    assert token < TOKEN_BUDGET
