"""Builds the application: routers, state, error handlers, and the one visible order of the middleware.

Nothing is built at import, and nothing here starts the engine: the caller owns it.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware import Middleware

from service import __version__
from service.api import admin, docs, health, metrics as metrics_route, native, usage
from service.api.deps import AppState
from service.api.errors import ErrorRenderer
from service.api.middleware.access import AccessLog
from service.api.middleware.authentication import Authentication
from service.api.middleware.body_limit import BodyLimit
from service.api.middleware.client import ClientAddress
from service.api.middleware.context import RequestContext
from service.api.middleware.hosts import AllowedHosts
from service.api.middleware.request_rate import RequestRate
from service.api.openai import chat, completions, models
from service.api.protocol import BoundedProtocol, Policy, bounded_protocol
from service.auth.access_control import AccessControl, AccessService, DevelopmentKey
from service.engine.backend import Backend
from service.engine.engine import Engine
from service.engine.telemetry import Telemetry
from service.inference import Inference
from service.limits.limiter import Limits
from service.limits.usage_report import UsageReports
from service.observability.metrics import Metrics
from service.settings import Settings


def new_id() -> str:
    """A fresh id of 128 random bits, well-formed as a request id."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class App:
    """The whole service, not yet running. `protocol` is uvicorn's HTTP protocol with our bounds."""

    asgi: FastAPI
    engine: Engine
    protocol: type[BoundedProtocol]
    access: AccessService
    limits: Limits

    def open(self) -> DevelopmentKey | None:
        """Reach the database before the first request; returns the development key where there is one.

        Blocks. Raises ConfigurationError. What cannot be reached is tried again while the service runs.
        """
        self.access.open()
        return self.access.development_key


def build(settings: Settings, backend: Backend | None = None) -> App:
    """Build the service over `backend`; without one over mlx, whose first import this is. Raises ConfigurationError."""
    metrics = Metrics()
    access = AccessService(settings, metrics)
    limits = Limits(settings, metrics, access.control.storage if settings.auth.enabled else None)
    if backend is None:
        from service.engine.mlx_backend import MlxBackend

        backend = MlxBackend(settings)
    engine = Engine(backend, settings.engine, telemetry=Telemetry(metrics))
    inference = Inference(engine, settings, limits)
    asgi = create_app(
        settings,
        engine=engine,
        inference=inference,
        metrics=metrics,
        access=access.control,
        limits=limits,
        running=_running(access, limits, inference),
    )
    policy = Policy(limits=settings.http, errors=ErrorRenderer(random.random), metrics=metrics, new_id=new_id)
    return App(asgi, engine, bounded_protocol(policy), access, limits)


@asynccontextmanager
async def _running(access: AccessService, limits: Limits, inference: Inference) -> AsyncIterator[None]:
    async with access.run(), limits.run():  # what is left of usage is written before the database closes
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
    running: AbstractAsyncContextManager[object] | None = None,
    new_id: Callable[[], str] = new_id,
    jitter: Callable[[], float] = random.random,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.perf_counter,
) -> FastAPI:
    """Build the application over objects that the caller made.

    `running` is entered when the server starts and left when it has stopped answering. `now` is wall time,
    `clock` monotonic; both, ids and jitter are parameters so that tests need not wait or patch.
    """
    state = AppState(
        settings=settings,
        engine=engine,
        inference=inference,
        metrics=metrics,
        errors=ErrorRenderer(jitter),
        access=access,
        limits=limits,
        usage=UsageReports(access.storage) if settings.auth.enabled else None,
        new_id=new_id,
        now=now,
        started=int(now()),
    )
    return _assemble(state, running or nullcontext(), clock)


def _assemble(state: AppState, running: AbstractAsyncContextManager[object], clock: Callable[[], float]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[AppState]:
        async with running:
            yield state

    app = FastAPI(
        title="mlxd",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would be built from the Host header
        openapi_url=None,  # api/docs.py has these routes, behind a principal
        middleware=_middleware(state, clock),
    )
    state["errors"].install(app)
    for part in (health, native, chat, completions, models, metrics_route, admin, usage):
        app.include_router(part.build_router())
    app.include_router(docs.build_router(app))
    return app


def _middleware(state: AppState, clock: Callable[[], float]) -> list[Middleware]:
    """Every layer between the server and the router, outermost first."""
    settings, errors, metrics, limits = state["settings"], state["errors"], state["metrics"], state["limits"]
    return [
        Middleware(RequestContext, errors=errors, metrics=metrics, new_id=state["new_id"]),
        Middleware(AccessLog, metrics=metrics, clock=clock),
        Middleware(ClientAddress, trusted=settings.server.trusted_proxies),
        Middleware(AllowedHosts, allowed=settings.server.allowed_hosts, errors=errors),
        Middleware(Authentication, access=state["access"], limits=limits, errors=errors, metrics=metrics),
        Middleware(RequestRate, limits=limits, errors=errors),
        Middleware(BodyLimit, limits=settings.http, errors=errors),
    ]
