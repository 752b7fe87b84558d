"""The watchdog: ends a process that is stuck, so that its supervisor starts another.

One thread of its own looks at the event loop's heartbeat and at the engine's progress, and re-arms a timer of the
interpreter's in C (faulthandler), which fires when Python cannot run at all because native code keeps the interpreter
lock: it dumps every stack and exits with 1. Everything else that trips exits with 70, and nobody's lock can prevent it:
the thread that ends the process is there beforehand and waits for a bare lock.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import structlog

from service.engine.backend import Backend
from service.engine.engine import Engine
from service.engine.telemetry import Telemetry
from service.observability.event_loop import Heartbeat
from service.observability.logging import flush
from service.settings import WatchdogSettings

INTERVAL = 1.0
"""Seconds between two looks at most; with short timeouts it looks ten times in the shortest."""

GRACE = 8.0
"""Seconds from a trip to the end of the process at the latest. Answers and the ledger of usage go out meanwhile; when
they are out sooner, it ends sooner."""

DEPENDED_ON = ("storage-", "log-writer")
"""Names of threads, or how they begin, without which requests wait for ever or nothing is known of them. The generation
thread is not among them: when it dies the engine fails, which ends the process too."""


class Watch(StrEnum):
    """What tripped."""

    ENGINE = "engine"
    START = "start"
    EVENT_LOOP = "event_loop"
    THREAD = "thread"


@dataclass(frozen=True, slots=True)
class Trip:
    """Why the process must end; `age` are the seconds for which it has been so."""

    watch: Watch
    reason: str
    age: float = 0.0


class NativeTimer:
    """The interpreter's timer in C: it needs no interpreter lock, and ends the process with 1. Any thread."""

    def enable(self) -> None:
        """Dump every stack also when the process aborts, as Metal's do when memory is out."""
        faulthandler.enable()

    def arm(self, seconds: float) -> None:
        """Fire in `seconds`; what was armed before is forgotten. Starts a thread of the system: some 0.2 ms."""
        faulthandler.dump_traceback_later(seconds, exit=True)

    def disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def dump(self) -> None:
        """Every stack to standard error, past the log and its thread. Blocks where nobody reads."""
        faulthandler.dump_traceback(all_threads=True)


class ArmedExit:
    """Ends the process with 70, `seconds` after it was armed, whatever else is stuck."""

    def __init__(self, seconds: float, end: Callable[[int], object]) -> None:
        self._seconds = seconds
        self._end = end
        self._armed = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def start(self) -> None:
        """Start the thread that will end the process, while threads can still be started."""
        threading.Thread(target=self._run, name="watchdog-exit", daemon=True).start()

    def arm(self) -> None:
        """Never blocks. Once."""
        self._armed = True
        self._lock.release()

    def dismiss(self) -> None:
        """Let its thread end, where it was not armed. Once."""
        if not self._armed:
            self._lock.release()

    def _run(self) -> None:
        self._lock.acquire()
        if self._armed:
            time.sleep(self._seconds)
            self._end(os.EX_SOFTWARE)


class Watchdog:
    """Watches an engine and the loop that it was started on.

    A trip ends the process within `grace` seconds; `end` ends it on the spot. Of `backend` it uses what any thread may.
    """

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        settings: WatchdogSettings,
        *,
        telemetry: Telemetry,
        native: NativeTimer | None = None,
        end: Callable[[int], object] = os._exit,
        grace: float = GRACE,
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._settings = settings
        self._telemetry = telemetry
        self._native = native or NativeTimer()
        self._end = end
        self._grace = grace
        self._log = structlog.get_logger("watchdog")
        self._heartbeat = Heartbeat(engine.tell, clock=engine.clock)
        timeouts = (settings.stall_timeout, settings.start_timeout, settings.loop_timeout)
        self._interval = min([INTERVAL, *(timeout / 10 for timeout in timeouts if timeout)])
        self._over = threading.Event()
        self._exit = ArmedExit(grace, end)
        self._dead = ""

    @property
    def loop_age(self) -> float:
        """Seconds since the event loop last answered: up to a second where nothing is wrong. Any thread."""
        return self._heartbeat.age

    @contextmanager
    def run(self) -> Iterator[None]:
        """Watch until the block ends. For a process of its own: it takes the interpreter's hooks."""
        self._native.enable()
        former = threading.excepthook
        threading.excepthook = partial(self._thread_died, former)
        self._exit.start()
        self._arm(self._settings.loop_timeout + self._interval)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            threading.excepthook = former
            self._exit.dismiss()
            thread.join(self._interval)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            if self.look():
                return
        self._native.disarm()

    def look(self) -> bool:
        """One look; True when it tripped. The watchdog's thread."""
        self._arm(self._settings.loop_timeout + self._interval)
        trip = self._stuck()
        if trip is not None:
            self._trip(trip)
        else:
            self._heartbeat.ask()
        return trip is not None

    def _arm(self, seconds: float) -> None:
        if self._settings.loop_timeout:
            self._native.arm(seconds)

    def _stuck(self) -> Trip | None:
        """What has stood still for longer than it may, if anything has."""
        settings, progress = self._settings, self._engine.progress
        if self._dead:
            return Trip(Watch.THREAD, f"the thread {self._dead} has died")
        if 0 < settings.loop_timeout < (age := self._heartbeat.silence):
            return Trip(Watch.EVENT_LOOP, f"the event loop has not answered for {age:.1f} s", age)
        phase = progress.phase
        limit = settings.start_timeout if phase.starting else settings.stall_timeout
        if 0 < limit < (age := progress.age or 0.0):
            watch = Watch.START if phase.starting else Watch.ENGINE
            return Trip(watch, f"no progress for {age:.1f} s while {phase}", age)
        return None

    def _thread_died(
        self, former: Callable[[threading.ExceptHookArgs], object], found: threading.ExceptHookArgs
    ) -> None:
        former(found)
        if found.thread is not None and found.thread.name.startswith(DEPENDED_ON):
            self._dead = found.thread.name

    def _trip(self, trip: Trip) -> None:
        """Tell who waits, leave what is known in the log, and end with 70, in time whatever else is stuck."""
        self._exit.arm()  # before anything that might block
        self._arm(self._grace + INTERVAL)
        self._telemetry.tripped(trip.watch)
        self._engine.tell(partial(self._engine.lose, trip.reason))
        try:
            self._report(trip)
            self._backend.release_pool()
        except Exception as error:  # noqa: BLE001  the dump before the end: nothing comes between a trip and the exit
            self._log.error("watchdog_dump_failed", exc_info=error)
            self._telemetry.internal_error("watchdog")
        if trip.watch is Watch.EVENT_LOOP:  # nobody can be told
            self._end(os.EX_SOFTWARE)

    def _report(self, trip: Trip) -> None:
        phase = self._engine.progress.phase
        self._log.critical(
            "watchdog_tripped", watch=trip.watch.value, reason=trip.reason, age=round(trip.age, 3), phase=phase.value
        )
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():  # noqa: SLF001 - the one way to see the others' stacks
            stack = "".join(traceback.format_stack(frame))
            self._log.critical("thread_stack", thread=names.get(ident, str(ident)), stack=stack)
        flush()
        self._native.dump()
