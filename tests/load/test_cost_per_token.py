"""What the service costs around the engine, in CPU time for each streamed token, so that a slip is found in CI.

32 streams of 128 tokens go to a service in a process of its own, with every layer on. What its engine takes is measured
in another, on such prompts, and taken off; each has one BLAS thread, because two wait for each other at the cost of the
processor. Both are told in units of a piece of Python that makes one event of a stream, measured while they run: who
shares the machine makes all three slower alike. (Measured before or after instead, the same service scattered by a
third.) The median of several rounds counts: what else happens adds to them, and a unit that was measured while it did
takes off, so that the least once hid 40 microseconds a token.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from service.bench.ceiling import BACKEND, Ceiling, Lap
from service.bench.client import Api, Client, Target
from service.bench.load import Arrivals, Limit, Load
from service.bench.workload import Lengths, Workload
from service.observability.process import cpu_seconds
from service.settings import Settings
from tests.conftest import ROOT
from tests.serving import AMPLE, Running, started
from tests.tiny import make_tiny_llama

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

STREAMS, TOKENS, ROUNDS = 32, 128, 5

MOST = 8.0
"""Units that a token may cost around the engine. Seen on 2 cores with nothing beside it: 1.8 to 4.9 in thirteen tries,
16.4 to 18.6 in sixteen with 40 microseconds more a token. Other work on the machine makes it more, so this must run
alone, and the best of TRIES counts."""

TRIES = 3

WORKLOAD = Workload(prompt=Lengths(4, 4), output=Lengths(TOKENS, TOKENS))
EVENT = {
    "id": "chatcmpl-0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "tiny",
    "choices": [{"index": 0, "delta": {"content": "word"}, "logprobs": None, "finish_reason": None}],
}


@dataclass
class Unit:
    """Makes events now and then while a block runs; `seconds` of CPU for `made` of them."""

    made: int = 0
    seconds: float = 0.0

    @contextmanager
    def beside(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._make, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _make(self, over: threading.Event) -> None:
        while not over.wait(0.01):
            began = time.thread_time()
            for _ in range(40):
                json.dumps(EVENT).encode()
            self.seconds += time.thread_time() - began
            self.made += 40

    def of(self, seconds: float) -> float:
        """Seconds in units."""
        return seconds * self.made / self.seconds


async def units_of_service(running: Running, load: Load) -> float:
    """Of a token, engine included."""
    unit = Unit()
    before = cpu_seconds(running.pid)
    with unit.beside():
        run = await load.put(Arrivals(streams=STREAMS), Limit(conversations=STREAMS))
    used = cpu_seconds(running.pid) - before
    assert [each.error for each in run.outcomes] == [None] * STREAMS
    tokens = sum(each.output_tokens for each in run.outcomes)
    assert tokens > 0.9 * STREAMS * TOKENS  # some end by themselves
    return unit.of(used / tokens)


def units_of_engine(laps: Iterator[Lap]) -> float:
    """Of a token, by our backend alone; the lap of another engine comes before it."""
    assert next(laps).contender != BACKEND
    unit = Unit()
    with unit.beside():
        lap = next(laps)
    assert lap.contender == BACKEND
    assert lap.tokens > 0.9 * STREAMS * TOKENS
    return unit.of((lap.cpu - unit.seconds) / lap.tokens)


def answer_with_engine(asked: Connection, values: dict[str, Any]) -> None:
    """What the engine's process does: a round, and its units, for each message that comes, until there are no more."""
    with closing(Ceiling(Settings.load(None, values), WORKLOAD)) as ceiling:
        laps = ceiling.laps(STREAMS, STREAMS, ROUNDS)
        while asked.recv():
            asked.send(units_of_engine(laps))


@contextmanager
def engine_alone(values: dict[str, Any]) -> Iterator[Connection]:
    """The other end of `answer_with_engine`, in a process that inherits this one's environment."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=answer_with_engine, args=(theirs, values))
    process.start()
    theirs.close()  # so that its death is the end of ours
    try:
        yield ours
        ours.send(False)
    finally:
        ours.close()
        process.join(30)
        assert process.exitcode == 0


def measured(tmp_path: Path, module: str) -> float:
    """Units of a token around the engine."""
    model = make_tiny_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=32, eos_token_id=258)
    values = {"model.reference": str(model), "engine.max_rows": STREAMS, "engine.memory_budget": 1 << 30}
    environment = {
        "MLXD_MODEL__REFERENCE": str(model),
        "MLXD_ENGINE__MAX_ROWS": str(STREAMS),
        "MLXD_ENGINE__MEMORY_BUDGET": str(1 << 30),
        "MLXD_LIMITS__PLANS": json.dumps(AMPLE["limits.plans"]),
    }
    service: list[float] = []
    engine: list[float] = []
    with (
        started(tmp_path / "state", timed=True, folder=str(ROOT), module=module, **environment) as running,
        engine_alone({**values, "server.state_dir": tmp_path / "engine"}) as alone,
        asyncio.Runner() as loop,
        closing(Client(Target(url=running.url))) as client,
    ):
        load = Load(client, WORKLOAD, api=Api.CHAT, model="default")
        loop.run(load.put(Arrivals(streams=STREAMS), Limit(conversations=8)))
        for _ in range(ROUNDS):
            service.append(loop.run(units_of_service(running, load)))
            alone.send(True)
            engine.append(alone.recv())
    found = median(service) - median(engine)
    print(f"\ncost of a token in units: service {service}, engine {engine}: {found:.1f} around it")
    return found


@pytest.fixture(autouse=True)
def one_blas_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes that a test starts."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


def test_a_streamed_token_costs_the_service_no_more_than_so_many_events_of_pure_python(tmp_path: Path) -> None:
    assert 0 < best(tmp_path, "service") <= MOST


@pytest.mark.soak
def test_forty_microseconds_more_for_each_token_are_found(tmp_path: Path) -> None:
    """The guard can fail: the same service with a little busy work in it."""
    assert best(tmp_path, "tests.load.costly") > MOST


def best(tmp_path: Path, module: str) -> float:
    """The least of TRIES, or the first that is good enough."""
    found = []
    for number in range(TRIES):
        found.append(measured(tmp_path / str(number), module))
        if found[-1] <= MOST:
            break
    return min(found)
