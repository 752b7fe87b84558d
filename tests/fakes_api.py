"""Stand-ins for what the API layer sits on, and two ways to drive an application without sockets.

`FakeInference.start` returns real `Generation` objects that a test feeds, or that `script` feeds at once.
`Client` sends whole requests; `Exchange` is one request seen message by message.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from service.api.deps import AppState
from service.app import create_app
from service.auth.access_control import AccessControl
from service.auth.authenticator import Authenticator
from service.auth.failure_audit import AuthFailure, FailureAudit
from service.auth.grant import Verifier
from service.auth.pepper import Peppers
from service.auth.principal import Principal
from service.auth.revocation import RunningGrants
from service.engine.backend import MemoryUse
from service.engine.engine import Engine, EngineState, EngineStatus
from service.engine.generation import Delta, FinishReason, Generation, GenerationRequest, Usage
from service.errors import Draining, NotFound, ServiceError
from service.inference import Accepted, Ask, Inference
from service.limits.limiter import Limits
from service.observability.metrics import Metrics
from service.settings import Settings
from service.storage.database import Database
from service.storage.opening import OpeningDatabase

USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
DONE = Delta(finish_reason=FinishReason.STOP, usage=USAGE)
NAMES = ("org/model", "default")


@dataclass
class FakeInfo:
    name: str = NAMES[0]
    context_length: int = 2048
    batchable: bool = True
    device: str = "cpu"


class FakeEngine:
    """An engine of which only the state is known."""

    def __init__(self) -> None:
        self.state = EngineState.READY
        self.info: FakeInfo | None = FakeInfo()
        self.detail = ""
        self.waiting = 0
        self.running = 0
        self.progress_age: float | None = None
        self.drain_for_good: bool | None = None

    def begin_drain(self, timeout: float, *, for_good: bool) -> None:
        self.state, self.drain_for_good = EngineState.DRAINING, for_good or bool(self.drain_for_good)

    def resume(self) -> None:
        if self.drain_for_good:
            raise Draining("The service is shutting down.")
        self.state, self.drain_for_good = EngineState.READY, None

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self.state,
            detail=self.detail,
            waiting=self.waiting,
            running=self.running,
            step_age=0.25,
            progress_age=self.progress_age,
            memory=MemoryUse(active=10, peak=20, buffer_cache=3, prefix_cache=4, prefix_entries=1),
            drain_for_good=self.drain_for_good,
        )


class FakeInference:
    """Records what was asked, and hands out generations."""

    def __init__(self, script: Sequence[Delta] | None = None) -> None:
        self.model_names = NAMES
        self.script = script
        self.refusal: ServiceError | None = None  # every time
        self.refusals: list[ServiceError] = []  # once each
        self.asks: list[Ask] = []
        self.principals: list[Principal] = []
        self.generations: list[Generation] = []
        self.cancelled: list[Generation] = []
        self.started = asyncio.Event()

    def models_of(self, principal: Principal) -> tuple[str, ...]:
        return NAMES if principal.models is None else tuple(name for name in NAMES if name in principal.models)

    def resolve_model(self, name: str | None, principal: Principal) -> str:
        if name is not None and name not in self.models_of(principal):
            raise NotFound("The requested model is not served here.", code="model_not_found", param="model")
        return NAMES[0]

    async def start(self, ask: Ask, principal: Principal, stack: AsyncExitStack) -> list[Generation]:
        self.asks.append(ask)
        self.principals.append(principal)
        if self.refusal is not None:
            raise self.refusal
        if self.refusals:
            raise self.refusals.pop()
        request = GenerationRequest(request_id=ask.request_id, prompt=(1,), max_tokens=ask.max_tokens or 1)
        rows = ask.n * max(1, len(ask.prompts))
        found = [Generation(request, self.cancelled.append) for _ in range(rows)]
        stack.callback(self._over, ask, principal, found)
        for generation in found:
            stack.callback(generation.close)
            for delta in self.script or ():
                generation.put(delta)
                if delta.usage is not None:
                    generation.meter.prompt_tokens = delta.usage.prompt_tokens
                    generation.meter.cached_tokens = delta.usage.cached_tokens
                    generation.meter.completion_tokens = delta.usage.completion_tokens
        self.generations += found
        self.started.set()
        return found

    def _over(self, ask: Ask, principal: Principal, found: list[Generation]) -> None:
        accepted = Accepted(principal, began_at=0.0, encoded_at=0.0)
        ask.over(accepted.record(ask, found, model=NAMES[0], ended_at=0.0))


def _no_database() -> Database:
    raise AssertionError("nobody asks for it here")


@dataclass
class Service:
    """An application over fakes, with everything a test may want to look at.

    Without `verifiers` everybody on this machine is LOCAL, as where authentication is off.
    """

    settings: Settings = field(default_factory=Settings)
    engine: FakeEngine = field(default_factory=FakeEngine)
    inference: FakeInference = field(default_factory=FakeInference)
    metrics: Metrics = field(default_factory=Metrics)
    clock: Callable[[], float] = lambda: 0.0
    limits_clock: Callable[[], float] = time.monotonic
    server: uvicorn.Server | None = None
    loop: asyncio.AbstractEventLoop | None = None
    verifiers: Sequence[Verifier] | None = None
    running: RunningGrants = field(default_factory=RunningGrants)
    audited: list[AuthFailure] = field(default_factory=list)
    store_was_reached: bool = True

    def __post_init__(self) -> None:
        ids = map("id-{}".format, itertools.count(1))
        self.access = AccessControl(
            authenticator=Authenticator(self.verifiers or (), enabled=self.verifiers is not None),
            running=self.running,
            failures=FailureAudit(self._audit, clock=lambda: 0.0),
            storage=OpeningDatabase(_no_database),
            peppers=Peppers(Path("pepper.json"), {1: bytes(32)}),
            ready=lambda: self.store_was_reached,
        )
        self.limits = Limits(self.settings, self.metrics, None, clock=self.limits_clock)
        self.app: FastAPI = create_app(
            self.settings,
            engine=cast("Engine", self.engine),
            inference=cast("Inference", self.inference),
            metrics=self.metrics,
            access=self.access,
            limits=self.limits,
            new_id=lambda: next(ids),
            jitter=lambda: 0.0,
            now=lambda: 1_700_000_000.5,
            clock=self.clock,
        )

    async def _audit(self, failures: Sequence[AuthFailure]) -> None:
        self.audited += failures

    def count(self, series: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(series, labels) or 0.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.json()["error"])

    def events(self) -> list[Any]:
        return list(sse_events(self.body))


def sse_events(body: bytes) -> Iterator[Any]:
    """The data of each event; `[DONE]` as it is, comments left out."""
    for block in body.decode().split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


class Exchange:
    """One request and its answer, message by message, as a server would see them."""

    def __init__(
        self,
        app: FastAPI,
        method: str,
        path: str,
        *,
        state: AppState | dict[str, Any],
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        raw = [(name.lower().encode(), value.encode()) for name, value in headers]
        if not any(name == b"host" for name, _ in raw):
            raw.append((b"host", b"localhost:8000"))
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": raw,
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": dict(state),
        }
        self._app = app
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._changed = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.reading = asyncio.Event()  # cleared: the client does not read, and sends block
        self.reading.set()

    def push(self, body: bytes = b"", *, more: bool = False) -> None:
        self._to_app.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def run(self) -> None:
        await self._app(self.scope, self._receive, self._send)

    async def until(self, condition: Callable[[Exchange], bool]) -> None:
        """Wait until what was sent satisfies `condition`."""
        while not condition(self):
            self._changed.clear()
            await self._changed.wait()

    async def _receive(self) -> dict[str, Any]:
        return await self._to_app.get()

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.sent.append(dict(message))
        self._changed.set()

    @property
    def starts(self) -> int:
        return sum(message["type"] == "http.response.start" for message in self.sent)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and self.sent[-1]["type"].endswith("body") and not self.sent[-1].get("more_body")

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def answer(self) -> Answer:
        start = next(message for message in self.sent if message["type"] == "http.response.start")
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers, self.body)


class Client:
    """Whole requests to a `Service`. Asserts of every answer that it started once and was completed."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.exchanges: list[Exchange] = []

    def exchange(self, method: str, path: str, headers: Sequence[tuple[str, str]] = ()) -> Exchange:
        found = Exchange(self.service.app, method, path, state=self._state(), headers=headers)
        self.exchanges.append(found)
        return found

    def _state(self) -> dict[str, Any]:
        async def entered() -> dict[str, Any]:
            async with self.service.app.router.lifespan_context(self.service.app) as state:
                return dict(state or {})

        found = entered()
        try:
            found.send(None)
        except StopIteration as end:
            return cast("dict[str, Any]", end.value)
        raise AssertionError("the lifespan waits for something")

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> Answer:
        exchange = self.exchange(method, path, headers)
        exchange.push(body or b"")
        await exchange.run()
        assert exchange.starts == 1
        assert exchange.complete
        return exchange.answer

    async def get(self, path: str) -> Answer:
        return await self.request("GET", path)

    async def post(self, path: str, payload: Any) -> Answer:
        return await self.request("POST", path, json.dumps(payload).encode(), [("content-type", "application/json")])

    def begin(self, path: str, payload: Any) -> tuple[Exchange, asyncio.Task[None]]:
        """Start a request whose answer the test feeds."""
        exchange = self.exchange("POST", path, [("content-type", "application/json")])
        exchange.push(json.dumps(payload).encode())
        return exchange, asyncio.ensure_future(exchange.run())
