"""One thread with one connection that does one piece of work after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from service.errors import ServiceError
from service.observability.logging import get_logger
from service.storage.failures import Reason, StorageFailure, driver_words, failure_of
from service.storage.telemetry import Telemetry

log = get_logger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], T]


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    future: Future[Any]


class Lane:
    """Owns `engine`. Holds at most `depth` pieces of work that wait. Any thread may call."""

    def __init__(self, name: str, engine: Engine, *, depth: int, telemetry: Telemetry) -> None:
        self._name = name
        self._engine = engine
        self._telemetry = telemetry
        self._queue: queue.Queue[_Job | None] = queue.Queue(depth)
        self._lock = threading.Lock()
        self._closed = False
        # A daemon: what was acknowledged is on the disk, so a process that forgets to close may still end.
        self._thread = threading.Thread(target=self._run, name=f"storage-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work[T]) -> Future[T]:
        """Never blocks and never raises: every failure is the future's. See `Database.read`."""
        future: Future[T] = Future()
        refusal: Reason | None = None
        with self._lock:
            if self._closed:
                refusal = Reason.CLOSED
            else:
                try:
                    self._queue.put_nowait(_Job(work, future))
                except queue.Full:
                    refusal = Reason.QUEUE_FULL
        if refusal is not None:
            self._telemetry.failed(refusal)
            future.set_exception(StorageFailure(refusal))
        return future

    def close(self) -> None:
        """Take no more, do what waits, end the thread, disconnect. Idempotent; not from within work."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._do(job)
            del job  # nothing of it lives on while the thread waits

    def _do(self, job: _Job) -> None:
        try:
            with self._engine.begin() as connection:
                result = job.work(connection)
        except ServiceError as error:
            job.future.set_exception(error)
        except BaseException as error:  # whoever waits must hear of it, and the thread must live
            failure = failure_of(error)
            if failure is None:
                log.exception("storage_work_failed", lane=self._name)
                self._telemetry.internal_error()
            else:
                log.warning("storage_failed", lane=self._name, reason=failure.reason, error=driver_words(error))
                self._telemetry.failed(failure.reason)
            job.future.set_exception(failure or error)
        else:
            job.future.set_result(result)
