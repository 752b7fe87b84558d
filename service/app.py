"""Builds the application: routers, state, error handlers, and the one visible order of the middleware.

Nothing is built at import, and nothing here starts the engine: the caller owns it.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from service import __version__
from service.api import admin, docs, drain, health, metrics as metrics_route, native, operations, status, usage
from service.api.deps import AppState
from service.api.errors import ErrorRenderer
from service.api.middleware.access import AccessLog
from service.api.middleware.authentication import Authentication
from service.api.middleware.body_limit import BodyLimit
from service.api.middleware.client import ClientAddress
from service.api.middleware.context import RequestContext
from service.api.middleware.hosts import AllowedHosts
from service.api.middleware.operations import OperationsOnly, for_operators
from service.api.middleware.request_rate import RequestRate
from service.api.openai import chat, completions, models
from service.api.protocol import BoundedProtocol, Policy, bounded_protocol
from service.api.scraper import Scraper
from service.auth.access_control import AccessControl, AccessService, DevelopmentKey
from service.engine.backend import Backend
from service.engine.engine import Engine
from service.engine.telemetry import Telemetry
from service.engine.watchdog import Watchdog
from service.inference import Inference
from service.limits.limiter import Limits
from service.limits.usage_report import UsageReports
from service.observability.event_loop import LoopWatch
from service.observability.ids import Ids
from service.observability.metrics import Metrics
from service.observability.record import RequestRecord
from service.observability.reloads import Reloads
from service.observability.request_metrics import RequestMetrics, no_exemplar
from service.observability.token_rate import TokenRate
from service.settings import ConfigurationError, Settings
from service.supervision.attempts import ONCE, Attempts
from service.supervision.policy import Verdict
from service.supervision.start import Start

if TYPE_CHECKING:  # these need an extra
    from service.observability.otlp import OpenTelemetry
    from service.observability.tracing import Tracing

INFERENCE = (chat, completions, native)


@dataclass(frozen=True, slots=True)
class App:
    """The whole service, not yet running. `protocol` is uvicorn's HTTP protocol with our bounds."""

    asgi: FastAPI
    engine: Engine
    protocol: type[BoundedProtocol]
    access: AccessService
    limits: Limits
    reloads: Reloads
    watchdog: Watchdog

    @property
    def operations(self) -> ASGIApp:
        """What the operator's listener serves of it."""
        return for_operators(self.asgi)

    def watch(self) -> AbstractContextManager[object]:
        """Watch over the engine and its loop until the block ends; what is stuck ends the process."""
        return self.watchdog.run()

    def open(self) -> DevelopmentKey | None:
        """Reach the database before the first request; returns the development key where there is one.

        Blocks. Raises ConfigurationError. What cannot be reached is tried again while the service runs.
        """
        self.access.open()
        return self.access.development_key

    async def close(self) -> None:
        """Write what is noted, and close the database. Harmless in every state, and twice."""
        await self.limits.flush()
        await self.access.close()

    def prepared(self, settings: Settings) -> Callable[[], None]:
        """See `reload.Reloadable`, as for `refresh`. Raises ConfigurationError."""
        parts = self.limits.prepared(settings.limits), self.access.prepared(settings.auth)

        def put_in_force() -> None:
            for part in parts:
                part()

        return put_in_force

    async def refresh(self) -> None:
        await self.access.refresh()


def build(
    settings: Settings, backend: Backend | None = None, *, start: Start | None = None, attempts: Attempts = ONCE
) -> App:
    """Build the service over `backend`; without one over mlx, whose first import this is. Raises ConfigurationError.

    `start` is what is known of this start, and `attempts` how the model is loaded.
    """
    start = start or Start(settings)
    metrics = Metrics()
    _tell_start(metrics, start.verdict)
    access = AccessService(settings, metrics)
    limits = Limits(settings, metrics, access.control.storage if settings.auth.enabled else None)
    backend = backend or _mlx(settings, start)
    counters = Telemetry(metrics)
    engine = Engine(
        backend,
        settings.engine,
        telemetry=counters,
        attempts=attempts,
        canary_interval=settings.watchdog.canary_interval,
    )
    watchdog = Watchdog(engine, backend, settings.watchdog, telemetry=counters)
    otlp = _open_telemetry(settings, metrics, engine.clock)
    inference = Inference(engine, settings, limits, observers=_observers(settings, metrics, otlp))
    reloads = Reloads(metrics)
    asgi = create_app(
        settings,
        engine=engine,
        inference=inference,
        metrics=metrics,
        access=access.control,
        limits=limits,
        reloads=reloads,
        running=_running(access, limits, inference, LoopWatch(metrics.event_loop_lag.observe), otlp),
        tracing=None if otlp is None else otlp.tracing,
        loop_age=lambda: watchdog.loop_age,
        start=start,
    )
    policy = Policy(limits=settings.http, errors=ErrorRenderer(random.random), metrics=metrics, new_id=Ids())
    return App(_routed(asgi), engine, bounded_protocol(policy), access, limits, reloads, watchdog)


def _routed(app: FastAPI) -> FastAPI:
    """`app`, with what FastAPI puts off until a request first meets each of its routers: 0.27 s for the first one."""
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/\0", "headers": []})
    return app


def _mlx(settings: Settings, start: Start) -> Backend:
    from service.engine.loading import load_model
    from service.engine.recording import RecordingBackend
    from service.engine.speed_record import Started

    started = Started.SUPERVISED if start.supervised else Started.SHELL
    return RecordingBackend(settings, started, load=partial(load_model, room=start.room))


def _observers(
    settings: Settings, metrics: Metrics, otlp: OpenTelemetry | None
) -> tuple[Callable[[RequestRecord], None], ...]:
    exemplar = no_exemplar if otlp is None else otlp.tracing.exemplar
    counted = RequestMetrics(metrics, max_consumers=settings.metrics.max_consumers, exemplar=exemplar)
    return counted, *(() if otlp is None else otlp.observers)


def _tell_start(metrics: Metrics, verdict: Verdict) -> None:
    metrics.safe_mode.set(bool(verdict.safe_mode))
    metrics.recent_deaths.set_function(lambda: verdict.died_recently(time.time()))


def _open_telemetry(settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> OpenTelemetry | None:
    """What leaves by OTLP, where an endpoint is configured; the SDK, an extra, is first imported here."""
    if not settings.tracing.endpoint:
        return None
    try:
        from service.observability.otlp import Collector, OpenTelemetry
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in {"opentelemetry", "requests"}:
            raise
        raise ConfigurationError("tracing.endpoint: needs an extra: pip install 'mlxd[otlp]'") from None
    collector = Collector(
        endpoint=settings.tracing.endpoint,
        version=__version__,
        instance=Ids()(),
        headers=settings.tracing.headers(),
        failed=lambda signal: metrics.otlp_failures.labels(signal).inc(),
    )
    return OpenTelemetry(
        collector,
        sample_ratio=settings.tracing.sample_ratio,
        metrics=settings.tracing.metrics,
        paths=[route.path for part in INFERENCE for route in part.build_router().routes if isinstance(route, APIRoute)],
        clock=clock,
    )


@asynccontextmanager
async def _running(
    access: AccessService, limits: Limits, inference: Inference, watch: LoopWatch, otlp: OpenTelemetry | None
) -> AsyncIterator[None]:
    telemetry = nullcontext() if otlp is None else otlp.run()
    # What is left of usage is written before the database closes, and spans go out when nothing makes any more.
    async with telemetry, watch.run(), access.run(), limits.run():
        try:
            yield
        finally:
            inference.close()


def create_app(
    settings: Settings,
    *,
    engine: Engine,
    inference: Inference,
    metrics: Metrics,
    access: AccessControl,
    limits: Limits,
    reloads: Reloads | None = None,
    running: AbstractAsyncContextManager[object] | None = None,
    tracing: Tracing | None = None,
    start: Start | None = None,
    new_id: Callable[[], str] | None = None,
    jitter: Callable[[], float] = random.random,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.perf_counter,
    loop_age: Callable[[], float] = lambda: 0.0,
) -> FastAPI:
    """Build the application over objects that the caller made. `running` is entered when the server starts and left
    when it has stopped answering. `now` is wall time, `clock` monotonic, `loop_age` the age of the loop's heartbeat."""
    state = AppState(
        settings=settings,
        engine=engine,
        inference=inference,
        metrics=metrics,
        errors=ErrorRenderer(jitter),
        access=access,
        limits=limits,
        scraper=Scraper(settings, metrics, engine=engine, limits=limits, access=access, loop_age=loop_age),
        token_rate=TokenRate(metrics),
        reloads=reloads or Reloads(metrics),
        usage=UsageReports(access.storage) if settings.auth.enabled else None,
        start=start or Start(settings),
        new_id=new_id or Ids(),
        now=now,
        started=int(now()),
        loop_age=loop_age,
    )
    return _assemble(state, running or nullcontext(), _middleware(state, clock, tracing))


def _assemble(state: AppState, running: AbstractAsyncContextManager[object], middleware: list[Middleware]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[AppState]:
        async with running:
            with state["token_rate"].run():
                yield state

    app = FastAPI(
        title="mlxd",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would be built from the Host header
        openapi_url=None,  # api/docs.py has these routes, behind a principal
        middleware=middleware,
        telemetry=TelemetryConfig(  # its own would ask the environment, and export stack traces
            auto_configure=False, tracing=False, metrics=False, logs=False, operation_spans=False
        ),
    )
    state["errors"].install(app)
    for part in (*INFERENCE, health, models, metrics_route, admin, operations, drain, status, usage):
        app.include_router(part.build_router())
    app.include_router(docs.build_router(app))
    return app


def _middleware(state: AppState, clock: Callable[[], float], tracing: Tracing | None) -> list[Middleware]:
    """Every layer between the server and the router, outermost first."""
    settings, errors, metrics, limits = state["settings"], state["errors"], state["metrics"], state["limits"]
    return [
        Middleware(RequestContext, errors=errors, metrics=metrics, new_id=state["new_id"], tracing=tracing),
        Middleware(AccessLog, metrics=metrics, clock=clock),
        Middleware(ClientAddress, trusted=settings.server.trusted_proxies),
        Middleware(AllowedHosts, allowed=settings.server.allowed_hosts, errors=errors),
        Middleware(Authentication, access=state["access"], limits=limits, errors=errors, metrics=metrics),
        Middleware(RequestRate, limits=limits, errors=errors),
        Middleware(OperationsOnly, errors=errors),
        Middleware(BodyLimit, limits=settings.http, errors=errors),
    ]
