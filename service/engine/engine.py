r"""The engine as the event loop sees it: start, submit, drain, stop, and the state machine.

    starting -> warming -> ready -> draining -> stopped
         \          \        \         \
          +----------+--------+---------+--> failed

Every method belongs to the event loop's thread; the generation thread runs `_main`, and what it wants to
say arrives on the loop by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import structlog

from service.engine.backend import Backend, MemoryUse, ModelInfo
from service.engine.generation import Generation, GenerationRequest
from service.engine.priority import give_way
from service.engine.telemetry import Telemetry
from service.engine.worker import CanaryFailed, Delivery, Worker
from service.errors import Draining, EngineFailed, ModelUnavailable, NotReady, ServiceError
from service.settings import EngineSettings
from service.supervision.attempts import ONCE, Attempts

RETRY_LOADING = 5.0
"""Seconds after which a client may ask again while the model loads."""


class _StoppedLoading(Exception):
    """The service stops while the model loads."""


class EngineState(StrEnum):
    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for probes and metrics. Ages are in seconds; `detail` is the progress or the reason.

    `held` rows are not given back; those that run are promised `reserved` bytes of `budget`. While it loads and
    warms, `done` of `total` of what `detail` names are over (bytes, files or stages; `total` 0 is unknown).
    """

    state: EngineState
    detail: str
    done: int = 0
    total: int = 0
    waiting: int
    running: int
    held: int = 0
    reserved: int = 0
    budget: int = 0
    step_age: float | None
    memory: MemoryUse


class Engine:
    """One warmed model behind a bounded queue, loaded as `attempts` says. `clock` is monotonic, as are deadlines."""

    def __init__(
        self,
        backend: Backend,
        settings: EngineSettings,
        *,
        telemetry: Telemetry,
        attempts: Attempts = ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.info: ModelInfo | None = None
        self.failure: ServiceError | None = None
        self._backend = backend
        self._telemetry = telemetry
        self._attempts = attempts
        self._log = structlog.get_logger("engine")
        self._state = EngineState.STARTING
        self._detail = "loading the model"
        self._done = self._total = 0
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._stopping = threading.Event()
        self._live: set[Generation] = set()

    @property
    def state(self) -> EngineState:
        return self._state

    def status(self) -> EngineStatus:
        """A snapshot; cheap."""
        worker = self._worker
        held, reserved = worker.books() if worker else (0, 0)
        return EngineStatus(
            state=self._state,
            detail=self._detail,
            done=self._done,
            total=self._total,
            waiting=worker.waiting if worker else 0,
            running=worker.running if worker else 0,
            held=held,
            reserved=reserved,
            budget=self.info.memory.budget if self.info else 0,
            step_age=self.clock() - worker.last_step if worker and worker.running else None,
            memory=worker.memory if worker else MemoryUse(),
        )

    async def start(self) -> None:
        """Start the generation thread and return at once; loading goes on there."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="generation", daemon=True)
        self._thread.start()

    async def wait(self, *states: EngineState) -> EngineState:
        """Wait until the engine is in one of these states; returns it."""
        while self._state not in states:
            await self._changed.wait()
        return self._state

    def ready_info(self) -> ModelInfo:
        """The loaded model. Raises NotReady, Draining or EngineFailed when new work would not be served."""
        match self._state:
            case EngineState.READY if self.info is not None:
                return self.info
            case EngineState.DRAINING | EngineState.STOPPED:
                raise Draining("The service is shutting down.", retry_after=self.settings.drain_timeout)
            case EngineState.FAILED:
                raise EngineFailed("The engine has failed.", retry_after=RETRY_LOADING)
            case _:
                raise NotReady("The model is still loading.", retry_after=RETRY_LOADING)

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Queue all of the requests or none. Raises QueueFull, NotReady, Draining, EngineFailed, InvalidRequest."""
        self.ready_info()
        assert self._worker is not None
        generations = [Generation(request, self._cancel) for request in requests]
        try:
            self._worker.submit(generations)
        except ServiceError as error:
            self._telemetry.rejected(error.code)
            raise
        self._live.update(generations)
        return generations

    def _cancel(self, generation: Generation) -> None:
        self._live.discard(generation)
        if self._worker is not None:
            self._worker.cancel(generation)
        if not self._live:
            self._notify()  # a drain may be waiting for nobody else

    async def drain(self, timeout: float) -> None:
        """Refuse new work, refuse what waits, let what runs finish for `timeout` seconds, then end it."""
        if self._state in {EngineState.FAILED, EngineState.STOPPED}:
            return
        was_ready = self._state is EngineState.READY
        self._set(EngineState.DRAINING, "shutting down")
        if not was_ready or self._worker is None:
            return
        error = Draining("The service is shutting down.", retry_after=self.settings.drain_timeout)
        self._worker.refuse_waiting(error)
        if not await self._finished(timeout):
            self._worker.abort_running(error)
            await self._finished(None)

    async def _finished(self, timeout: float | None) -> bool:
        """Wait until no generation is live; False when `timeout` seconds were not enough."""
        try:
            async with asyncio.timeout(timeout):
                while self._live and self._state is not EngineState.FAILED:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the generation thread and free the model; what still runs gets an error. Idempotent."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._state is not EngineState.FAILED:
            self._set(EngineState.STOPPED, "stopped")

    # -- the generation thread ----------------------------------------------------------------------------

    def _main(self) -> None:
        give_way()
        error: ServiceError = EngineFailed("The engine has failed.", retry_after=RETRY_LOADING)
        clean = False
        try:
            self._serve()
            clean = True
        except ModelUnavailable as unavailable:
            self._log.error("model_unavailable", reason=unavailable.message)
            error = unavailable
        except _StoppedLoading:
            clean = True
        except CanaryFailed:
            self._log.error("engine_failed")
        finally:
            # Also on an exception nobody foresaw: no caller ever waits on a dead thread.
            if self._worker is not None:
                self._worker.fail_all(Draining("The service is shutting down.") if clean else error)
            if not clean:
                self._tell(lambda: self._fail(error))
            self._backend.close()

    def _serve(self) -> None:
        tell = partial(self._report, EngineState.STARTING)
        info = self.info = self._attempts.run(self._load, tell=tell, pause=self._pause)
        self._report(EngineState.WARMING, "warming up")
        with self._telemetry.warming():
            self._backend.warm_up(
                lambda what, done, total: self._report(EngineState.WARMING, f"{what} ({done}/{total})", done, total)
            )
        self._worker = Worker(
            self._backend,
            info,
            self.settings,
            clock=self.clock,
            deliver=lambda batch: self._tell(lambda: self._deliver(batch)),
            telemetry=self._telemetry,
        )
        self._report(EngineState.READY, "ready")
        self._worker.run()

    def _load(self) -> ModelInfo:
        with self._telemetry.loading():
            return self._backend.load(self._report_loading)

    def _pause(self, seconds: float) -> None:
        """Wait before a load; ends it when the service stops meanwhile."""
        if self._stopping.wait(seconds):
            raise _StoppedLoading

    def _report_loading(self, what: str, done: int, total: int) -> None:
        """Tell the loop how far a download or conversion is. Any thread may; raises nothing through its code."""
        self._tell(lambda: self._progress(EngineState.STARTING, what, done, total))

    def _report(self, state: EngineState, detail: str, done: int = 0, total: int = 0) -> None:
        """Tell the loop how far warm-up is; ends it when the service stops meanwhile."""
        if self._stopping.is_set():
            raise _StoppedLoading
        self._tell(lambda: self._progress(state, detail, done, total))

    def _tell(self, call: Callable[[], None]) -> None:
        """Run `call` on the event loop; a loop that has closed has nobody left to tell."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self._log.info("loop_closed")

    # -- on the loop --------------------------------------------------------------------------------------

    def _deliver(self, batch: Sequence[Delivery]) -> None:
        for generation, delta in batch:
            generation.put(delta)
            if delta.final:
                self._live.discard(generation)
        if not self._live:
            self._notify()

    def _progress(self, state: EngineState, detail: str, done: int, total: int) -> None:
        """Loading moves on, but not back, and not out of draining, stopped or failed."""
        late = self._state is EngineState.WARMING and state is EngineState.STARTING
        if self._state in {EngineState.STARTING, EngineState.WARMING} and not late:
            self._set(state, detail, done, total)

    def _fail(self, error: ServiceError) -> None:
        self.failure = error
        self._set(EngineState.FAILED, error.message)

    def _set(self, state: EngineState, detail: str, done: int = 0, total: int = 0) -> None:
        self._state, self._detail, self._done, self._total = state, detail, done, total
        self._notify()

    def _notify(self) -> None:
        """Wake everybody who waits for a change; each looks for itself."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
