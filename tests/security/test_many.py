"""A thousand principals and thousands of unknown keys, through the layers as they are mounted: nothing grows."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.api.errors import ErrorRenderer
from service.api.middleware.authentication import Authentication
from service.api.middleware.request_rate import RequestRate
from service.auth.access_control import AccessService
from service.auth.api_keys import Operator
from service.auth.key_format import generate
from service.auth.key_spec import KeySpec
from service.auth.pepper import Peppers, pepper_file
from service.limits.limiter import Limits
from service.observability.metrics import Metrics
from service.settings import Settings
from service.storage.connection import Connection
from service.storage.database import Database
from tests.serving import AMPLE, opened

PRINCIPALS = 1000


def make_keys(settings: Settings, number: int) -> list[str]:
    peppers = Peppers.open(pepper_file(settings.auth, settings.server.state_dir))
    operator = Operator(actor="test", peppers=peppers, environment="test")

    def make(connection: Connection) -> list[str]:
        spec = KeySpec.of(name="one of many", scopes=["models"])
        return [operator.create(connection, spec).text for _ in range(number)]

    with Database.open(settings.storage, settings.server.state_dir, migrate=True) as database:
        return database.write(make).result()


class Layers:
    """What stands before the body, around an application that does nothing."""

    def __init__(self, settings: Settings) -> None:
        metrics = Metrics()
        errors = ErrorRenderer(lambda: 0.0)
        self.service = AccessService(settings, metrics)
        self.limits = Limits(settings, metrics, self.service.control.storage)
        self.let_in = 0
        self.statuses: dict[int, int] = {}
        rate = RequestRate(self._application, limits=self.limits, errors=errors)
        self._app = Authentication(
            rate, access=self.service.control, limits=self.limits, errors=errors, metrics=metrics
        )

    async def _application(self, *_: object) -> None:
        self.let_in += 1

    async def _send(self, message: Any) -> None:
        if "status" in message:
            self.statuses[message["status"]] = self.statuses.get(message["status"], 0) + 1

    async def _receive(self) -> Any:
        raise AssertionError("nobody reads")

    async def ask(self, key: str) -> None:
        scope = {
            "type": "http", "method": "GET", "path": "/v1/models", "client": ("127.0.0.1", 1),
            "headers": [(b"authorization", f"Bearer {key}".encode())], "state": {"line": {}, "request_id": "r"},
        }  # fmt: skip
        await self._app(scope, self._receive, self._send)

    async def median(self, keys: list[str]) -> float:
        """Microseconds of one request."""
        taken = []
        for key in keys:
            begin = time.perf_counter()
            await self.ask(key)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken) * 1e6


@pytest.mark.no_cover  # many turns of what others cover
async def test_memory_and_latency_stay_flat(tmp_path: Path, count: Callable[[str, int, int], int]) -> None:
    strange = count("unknown keys", 4_000, 10_000)
    settings = Settings.load(None, {"server.state_dir": tmp_path / "state", **AMPLE})
    keys = make_keys(settings, PRINCIPALS)
    layers = Layers(settings)
    async with opened(layers.service), layers.limits.run():
        few = await layers.median(keys[:10] * 200)
        many = await layers.median(keys * 2)
        unknown = [generate("test").text for _ in range(strange)]
        tracemalloc.start()
        try:
            await layers.median(unknown[: strange // 2])
            first, _ = tracemalloc.get_traced_memory()
            await layers.median(unknown[strange // 2 :])
            second, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        strangers = await layers.median(unknown[:1000])
        after = await layers.median(keys * 2)
    print(
        f"\nmicroseconds a request: {few:.0f} of 10 principals, {many:.0f} of 1000, {after:.0f} after {strange} "
        f"unknown keys, {strangers:.0f} of one; they left {first / 1e6:.2f} MB half way and {second / 1e6:.2f} MB"
    )
    assert layers.statuses == {401: strange + 1000}
    assert layers.let_in == 2000 + 4 * PRINCIPALS
    assert many < 3 * few + 100
    assert after < 3 * few + 100
    assert first < 5e6
    assert second - first < 1e6
