"""What strangers and consumers may choose (paths, methods, models, keys, tenants, prompts) makes no new series."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from service.auth.principal import Principal, Scope
from service.engine.engine import Engine, EngineState
from service.engine.telemetry import Telemetry
from service.errors import Unauthorized
from service.inference import Inference
from service.limits.limiter import Limits
from service.observability.exposition import TEXT, render
from service.observability.metrics import Metrics
from service.observability.request_metrics import RequestMetrics
from service.settings import Settings
from tests.fakes import FakeBackend
from tests.fakes_api import Client, FakeEngine, FakeInference, Service
from tests.fakes_auth import FakeGrant
from tests.serving import AMPLE

pytestmark = pytest.mark.anyio

MAX_CONSUMERS = 200
WARM_UP = 400
VALUES_A_ROUND = 8
NASTY = '"\\\n\r\t{}=,#\0\u2028é😀/%$ab01'


@dataclass
class Anybody:
    """Believes every credential that begins with `fake-known`, and makes a principal of its text."""

    texts: random.Random = field(default_factory=lambda: random.Random(1))

    def recognises(self, credential: str) -> bool:
        return credential.startswith("fake-")

    async def verify(self, credential: str, address: str) -> FakeGrant:
        if not credential.startswith("fake-known"):
            raise Unauthorized("unknown_key")
        tenant = hostile(self.texts)
        return FakeGrant(Principal(id=credential, tenant=tenant, scopes=frozenset(Scope), key_id=hostile(self.texts)))


def hostile(texts: random.Random) -> str:
    """A text that was never seen before."""
    return f"evil{texts.getrandbits(64):x}" + "".join(texts.choices(NASTY, k=texts.randrange(12)))


@dataclass
class World:
    """Every layer of the service, from its middleware to the generation thread."""

    metrics: Metrics
    client: Client
    texts: random.Random = field(default_factory=lambda: random.Random(2))

    async def round(self, number: int) -> None:
        """Three requests with values of their own: of a stranger, of a consumer who is refused, of one who is not."""
        path, method = f"/v1/{hostile(self.texts)}", hostile(self.texts)
        await self.client.request(method, path, headers=[("authorization", f"Bearer fake-{number}")])
        known = [("authorization", f"Bearer fake-known-{number}"), ("content-type", "application/json")]
        path = self.texts.choice(["/v1/chat/completions", "/generate"])
        body = {"model": hostile(self.texts), "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        await self.client.request("POST", path, json.dumps(body).encode(), known)
        prompt = "a" * self.texts.randrange(1, 4000)
        answer = await self.client.request(
            "POST", "/generate", json.dumps({"prompt": prompt, "max_tokens": 1}).encode(), known
        )
        assert answer.status == 200, answer.body
        self.client.exchanges.clear()

    def series(self) -> set[str]:
        lines = render(self.metrics.registry, TEXT).decode().split("\n")
        return {line.rpartition(" ")[0] for line in lines if line and not line.startswith("#")}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    settings, metrics = Settings.load(None, dict(AMPLE)), Metrics()
    engine = Engine(FakeBackend(), settings.engine, telemetry=Telemetry(metrics))
    inference = Inference(
        engine,
        settings,
        Limits(settings, metrics, None),
        observers=[RequestMetrics(metrics, max_consumers=MAX_CONSUMERS)],
    )
    service = Service(
        settings=settings,
        metrics=metrics,
        engine=cast("FakeEngine", engine),
        inference=cast("FakeInference", inference),
        verifiers=[Anybody()],
    )
    await engine.start()
    await engine.wait(EngineState.READY)
    yield World(metrics, Client(service))
    await engine.stop()
    inference.close()


@pytest.mark.no_cover  # many turns of what others cover
async def test_thousands_of_hostile_values_change_nothing_in_the_number_of_series(
    world: World, count: Callable[[str, int, int], int]
) -> None:
    rounds = count("hostile values", 6_400, 20_000) // VALUES_A_ROUND
    for number in range(WARM_UP):
        await world.round(number)
    before = world.series()
    for number in range(WARM_UP, WARM_UP + rounds):
        await world.round(number)
    assert world.series() == before
    consumers = {
        sample.labels["tenant"] for family in world.metrics.consumer_requests.collect() for sample in family.samples
    }
    assert len(consumers) == MAX_CONSUMERS + 1
    ours = {each for each in before if "evil" in each}
    assert all(each.startswith(("mlxd_consumer_requests_total{", "mlxd_consumer_tokens_total{")) for each in ours)
    assert len(ours) == MAX_CONSUMERS * 4
