"""The ledger of usage when the service ends: a clean stop loses nothing, kill -9 the last second at most."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.settings import Settings, StorageSettings
from service.storage.database import Database
from service.storage.schema import USAGE
from tests.faults.test_kill import service
from tests.serving import bearer, make_key

LOST_AT_MOST = 1.0
"""Seconds before a kill."""

CLIENTS = 3
PATIENCE = 60.0


class Load:
    """Clients that generate for as long as they are answered; `answered` is when each request was, by its id."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, bearer(key)
        self.answered: dict[str, float] = {}
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _client(self) -> None:
        body = {"prompt": "x" * 40, "max_tokens": 8, "temperature": 0}
        with suppress(httpx.TransportError), httpx.Client(headers=self._headers, timeout=30) as client:
            while (answer := client.post(f"{self._url}/generate", json=body)).status_code == 200:
                self.answered[answer.headers["x-request-id"]] = time.monotonic()

    def for_seconds(self, seconds: float) -> None:
        """Wait until there were answers for so long."""
        ends = time.monotonic() + PATIENCE
        while not self.answered:
            assert time.monotonic() < ends
            time.sleep(0.01)
        time.sleep(seconds)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def settings(storage_settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of this process and, by the environment, of the service that it starts."""
    monkeypatch.setenv("MLXD_STORAGE__URL", storage_settings.url)
    monkeypatch.setenv("MLXD_LIMITS__PLANS", '{"default": {"requests_per_minute": 1000000, "request_burst": 1000000}}')
    return Settings.load(None, {"server.state_dir": tmp_path / "state"})


def recorded(settings: Settings) -> Counter[str]:
    """How many rows each request has."""
    with Database.open(settings.storage, settings.server.state_dir) as database:
        ids = database.read(lambda connection: connection.execute(USAGE.select()).all()).result()
    return Counter(row.request_id for row in ids)


def test_on_a_clean_stop_no_row_is_lost(settings: Settings, tmp_path: Path, tiny_model_dir: Path) -> None:
    key = make_key(settings, "inference").text
    with service(settings.server.state_dir, tiny_model_dir, tmp_path / "log") as (running, url, _):
        load = Load(url, key)
        load.for_seconds(1.0)
        running.terminate()
        assert running.wait(PATIENCE) == 0
        load.join()
    found = recorded(settings)
    assert load.answered
    assert load.answered.keys() <= found.keys()
    assert set(found.values()) == {1}
    print(f"clean stop: {len(load.answered)} requests answered, {len(found)} rows")


@pytest.mark.timeout(1800)
def test_a_kill_loses_the_last_second_at_most(
    settings: Settings, tmp_path: Path, tiny_model_dir: Path, count: Callable[[str, int, int], int]
) -> None:
    key = make_key(settings, "inference").text
    rng = random.Random(3)
    oldest = 0.0
    for _ in range(count("services killed while they write usage", 1, 50)):
        with service(settings.server.state_dir, tiny_model_dir, tmp_path / "log") as (running, url, _):
            load = Load(url, key)
            load.for_seconds(LOST_AT_MOST + 0.5 + rng.random())
            killed = time.monotonic()
            os.kill(running.pid, signal.SIGKILL)
            load.join()
        found = recorded(settings)
        lost = [killed - at for request, at in load.answered.items() if request not in found]
        oldest = max([oldest, *lost])
        assert any(killed - at > LOST_AT_MOST for at in load.answered.values())
        assert oldest <= LOST_AT_MOST
        assert set(found.values()) == {1}
        print(f"killed: {len(load.answered)} answered, {len(lost)} lost, the oldest {oldest:.2f} s before")
