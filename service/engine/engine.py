r"""The engine as the event loop sees it: start, submit, drain, stop, and the state machine.

    starting -> warming -> ready --> stopped (from each of the three)
         \          \        \
          +----------+--------+---> failed

    draining <-> any of the first three: loading goes on below

A drain (`drain.py`) lies over the state, which is `draining` for as long as it does, whatever is reached below.
`begin_drain` puts it on. `resume` takes it off, and the state is what is below by then; not so when the drain is for
good, as a signal's is. Nothing hides `failed` and `stopped`, and nothing leads out of them.

Every method belongs to the event loop's thread, `_main` to the generation thread, which reaches the loop by `tell`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import structlog

from service.engine.arrivals import Arrivals
from service.engine.backend import Backend, MemoryUse, ModelInfo
from service.engine.canary import CanaryFailed
from service.engine.drain import Drain
from service.engine.generation import Generation, GenerationRequest
from service.engine.outbox import Delivery
from service.engine.priority import give_way
from service.engine.progress import Phase, Progress
from service.engine.startup import Startup, StoppedLoading
from service.engine.states import RETRY_LOADING, EngineState, EngineStatus, refusal
from service.engine.telemetry import Telemetry
from service.engine.worker import Worker
from service.errors import Draining, EngineFailed, ModelUnavailable, ServiceError
from service.settings import EngineSettings
from service.supervision.attempts import ONCE, Attempts

__all__ = ["Engine", "EngineState", "EngineStatus"]


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
        canary_interval: float = 0.0,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.progress = Progress(clock)
        self.info: ModelInfo | None = None
        self.failure: ServiceError | None = None
        self._backend = backend
        self._telemetry = telemetry
        self._canary_interval = canary_interval
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
        self._lost = False
        self._live: set[Generation] = set()
        self._drain: Drain | None = None
        self.arrivals = Arrivals()

    @property
    def state(self) -> EngineState:
        over = self._drain is not None and self._state not in {EngineState.FAILED, EngineState.STOPPED}
        return EngineState.DRAINING if over else self._state

    def status(self) -> EngineStatus:
        """A snapshot; cheap."""
        worker, state, drain = self._worker, self.state, self._drain
        held, reserved = worker.books() if worker else (0, 0)
        return EngineStatus(
            state=state,
            detail=drain.detail if drain is not None and state is EngineState.DRAINING else self._detail,
            done=self._done,
            total=self._total,
            waiting=worker.waiting if worker else 0,
            running=worker.running if worker else 0,
            held=held,
            reserved=reserved,
            budget=self.info.memory.budget if self.info else 0,
            step_age=self.clock() - worker.last_step if worker and worker.running else None,
            progress_age=self.progress.age,
            memory=worker.memory if worker else MemoryUse(),
            drain_for_good=None if drain is None else drain.for_good,
        )

    async def start(self) -> None:
        """Start the generation thread and return at once; loading goes on there."""
        self._loop = asyncio.get_running_loop()
        self.progress.enter(Phase.LOADING)
        self._thread = threading.Thread(target=self._main, name="generation", daemon=True)
        self._thread.start()

    async def wait(self, *states: EngineState) -> EngineState:
        """Wait until the engine is in one of these states; returns it."""
        while self.state not in states:
            await self._changed.wait()
        return self.state

    def ready_info(self) -> ModelInfo:
        """The loaded model. Raises NotReady, Draining or EngineFailed when new work would not be served."""
        state = self.state
        if state is EngineState.READY and self.info is not None:
            return self.info
        if state is EngineState.DRAINING and self._drain is not None:
            raise self._drain.refusal()
        raise refusal(state, drain_timeout=self.settings.drain_timeout)

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Queue all of the requests or none. Raises QueueFull, NotReady, Draining, EngineFailed, InvalidRequest."""
        self.ready_info()
        assert self._worker is not None
        self.arrivals.came(self._worker, sum(len(request.prompt) for request in requests))
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
        if self._worker is not None and not self._lost:
            self._worker.cancel(generation)
        if not self._live:
            self._notify()  # a drain may be waiting for nobody else

    def begin_drain(self, timeout: float, *, for_good: bool) -> asyncio.Task[None]:
        """Refuse new work and what waits, at once; the task lets what runs finish for `timeout` seconds, then ends it.

        Whoever drains an engine that does already joins, with the timeout of the first.
        """
        if self._drain is None:
            after = self.settings.drain_timeout
            self._drain = Drain(self._worker, self._live, self._finished, timeout, retry_after=after)
        self._drain.for_good |= for_good
        self._drain.refuse_waiting()
        self._notify()
        return self._drain.task

    async def drain(self, timeout: float) -> None:
        """Drain for good, and wait for the end of it."""
        await self.begin_drain(timeout, for_good=True)

    def resume(self) -> None:
        """Undo a drain. Harmless where there is none. Raises Draining for one that is for good."""
        if self._drain is None:
            return
        if self._drain.for_good:
            raise self._drain.refusal()
        self._drain.task.cancel()
        self._drain = None
        self._notify()

    async def _finished(self, timeout: float) -> bool:
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
        if self._worker is not None and not self._lost:
            self._worker.stop()
        if self._thread is not None and not self._lost:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._state is not EngineState.FAILED:
            self._set(EngineState.STOPPED, "stopped")

    def lose(self, detail: str) -> None:
        """The generation thread is stuck: `failed`, and everybody who waits is told so, on its behalf. It is neither
        asked nor waited for any more: it may hold the worker's lock."""
        if self._state in {EngineState.FAILED, EngineState.STOPPED}:
            return
        self._lost = True
        self.arrivals.lose()
        error = EngineFailed("The engine has failed.", retry_after=RETRY_LOADING)
        self._fail(error, detail)
        for generation in tuple(self._live):
            generation.fail(error)

    def tell(self, call: Callable[[], None]) -> bool:
        """Run `call` on the event loop, from any thread; False where none runs yet, or any more."""
        if self._loop is None or self._loop.is_closed():
            return False
        with suppress(RuntimeError):  # it closes at this moment
            self._loop.call_soon_threadsafe(call)
        return True

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
        except StoppedLoading:
            clean = True
        except CanaryFailed:
            pass
        finally:
            # Also on an exception nobody foresaw: no caller ever waits on a dead thread.
            if not clean:
                self._log.error("engine_failed", reason=error.message)
            if self._worker is not None:
                self._worker.fail_all(Draining("The service is shutting down.") if clean else error)
            if not clean:
                self.tell(lambda: self._fail(error))
            self._backend.close()
            self.progress.rest()

    def _serve(self) -> None:
        startup = Startup(
            self._backend,
            attempts=self._attempts,
            telemetry=self._telemetry,
            progress=self.progress,
            stopping=self._stopping,
            heard=self._report,
        )
        info = startup.run(partial(setattr, self, "info"))
        self._worker = Worker(
            self._backend,
            info,
            self.settings,
            clock=self.clock,
            deliver=lambda batch, heard: self.tell(lambda: self._deliver(batch, heard)),
            telemetry=self._telemetry,
            progress=self.progress,
            canary_interval=self._canary_interval,
        )
        self._report(EngineState.READY, "ready", 0, 0)
        self._worker.run()

    def _report(self, state: EngineState, detail: str, done: int, total: int) -> None:
        """Tell the loop how far it is. Any thread."""
        self.tell(lambda: self._progress(state, detail, done, total))

    # -- on the loop --------------------------------------------------------------------------------------

    def _deliver(self, batch: Sequence[Delivery], heard: Callable[[], object]) -> None:
        heard()
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

    def _fail(self, error: ServiceError, detail: str = "") -> None:
        self.failure = error
        self._set(EngineState.FAILED, detail or error.message)

    def _set(self, state: EngineState, detail: str, done: int = 0, total: int = 0) -> None:
        self._state, self._detail, self._done, self._total = state, detail, done, total
        self._notify()

    def _notify(self) -> None:
        """Wake everybody who waits for a change; each looks for itself."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
