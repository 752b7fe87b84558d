"""Lines on their way out: a bounded queue, and one thread that renders and writes them.

Whoever has a line never waits and never fails, whatever becomes of it: a disk that is full, a pipe that is closed or
that nobody reads. Where lines come faster than they can be written the oldest are dropped; all that are lost are
counted, and when writing works again a line says how many.

The standard library's QueueListener has no bound in time when it stops, and its queues refuse the newest line.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, Protocol, TextIO

BATCH: Final = 256
"""Most lines that are written at once."""

GATHERING: Final = 0.02
"""Seconds that a line may wait for others to be written with it: to wake the thread for each one takes the interpreter
away from whoever has just logged, for longer than the writing does."""

FLUSH_TIMEOUT: Final = 2.0
"""Seconds for what is queued when the process ends; whatever is left then is lost."""
END_TIMEOUT: Final = 0.2
"""Seconds for the thread to end that has nothing left to write."""


class Outlet(Protocol):
    """Where lines go. Used by the writer's thread alone."""

    def write(self, lines: Sequence[str]) -> int:
        """Write whole lines, each with its end; returns how many of them, the last ones, did not get out whole."""


class Descriptor:
    """A file, pipe or device, written without Python's own buffer: whoever waits in that keeps its lock.

    A line of which only a part got out (a disk that was full) is ended before the next one begins.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._torn = False

    def write(self, lines: Sequence[str]) -> int:
        encoded = [line.encode("utf-8", "backslashreplace") for line in lines]
        head = b"\n" if self._torn else b""
        rest = memoryview(head + b"".join(encoded))
        total = len(rest)
        with suppress(OSError):
            while rest:
                rest = rest[self._some(rest) :]
        sent = total - len(rest)
        written = sent - len(head)
        ends = list(itertools.accumulate(map(len, encoded)))
        if sent:
            self._torn = written not in (0, *ends)
        return sum(end > written for end in ends)

    def _some(self, data: memoryview) -> int:
        """What a write took. Waits for as long as it takes where others made the descriptor non-blocking."""
        while True:
            try:
                return os.write(self._number, data)
            except BlockingIOError:
                select.select((), (self._number,), ())


class Stream:
    """A stream of Python's, looked up for each write: a terminal, on which a spinner may want lines above it."""

    def __init__(self, stream: Callable[[], TextIO]) -> None:
        self._stream = stream

    def write(self, lines: Sequence[str]) -> int:
        try:
            stream = self._stream()
            stream.write("".join(lines))
            stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            return len(lines)
        return 0


@dataclass(frozen=True, slots=True)
class _Line:
    render: Callable[[], str]
    outlet: Outlet


class LineWriter:
    """Writes to `outlet`, and to others in the same order; at most `capacity` lines wait. Any thread may call.

    `notice` makes the line that says how many are missing before it.
    """

    def __init__(self, outlet: Outlet, *, capacity: int, notice: Callable[[int], str]) -> None:
        self._outlet = outlet
        self._capacity = capacity
        self._notice = notice
        self._queue: SimpleQueue[_Line | threading.Event | None] = SimpleQueue()  # may be put into at any moment
        self._lock = threading.RLock()
        self._dropped = 0
        self._noticed = 0
        self._closed = False
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Lines that were not written so far: dropped, or refused by the system."""
        return self._dropped

    def put(self, render: Callable[[], str], outlet: Outlet | None = None) -> None:
        """Let `render` make a line, and write it. `render` runs on the writer's thread and must not raise."""
        if self._closed:
            self.lose()
            return
        if self._thread is None:
            self._start()
        if self._queue.qsize() >= self._capacity:
            with suppress(Empty):
                self._drop(self._queue.get_nowait())
        self._queue.put(_Line(render, outlet or self._outlet))

    def lose(self, lines: int = 1) -> None:
        """Count lines that are not written."""
        with self._lock:
            self._dropped += lines

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait until what was put before is written or lost; False when that took longer."""
        if self._closed or self._thread is None:
            return self._ended
        reached = threading.Event()
        self._queue.put(reached)
        self._hurry.set()
        return reached.wait(timeout)

    def close(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Write what is queued and end the thread; False when it still writes: it is left behind. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._hurry.set()
        if self._thread is not None:
            self._thread.join(timeout)
        return self._ended

    @property
    def _ended(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def _start(self) -> None:
        """With the first line: most commands have none."""
        with self._lock:
            if self._thread is None:  # another thread may have had the first line too
                self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
                self._thread.start()

    def _drop(self, item: _Line | threading.Event | None) -> None:
        if isinstance(item, _Line):
            self.lose()
        elif item is not None:
            item.set()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            if self._queue.qsize() < BATCH:
                self._hurry.wait(GATHERING)
                self._hurry.clear()  # whatever is in a hurry was put before it said so
            with suppress(Empty):
                while len(batch) < BATCH:
                    batch.append(self._queue.get_nowait())
            lines = [item for item in batch if isinstance(item, _Line)]
            for outlet, group in itertools.groupby(lines, key=lambda line: line.outlet):
                self._write(outlet, [line.render() for line in group])
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            ended = None in batch

    def _write(self, outlet: Outlet, lines: list[str]) -> None:
        missing = self._dropped - self._noticed if outlet is self._outlet else 0
        if not missing:
            self.lose(outlet.write(lines))
            return
        lost = outlet.write([self._notice(missing), *lines])
        if lost <= len(lines):
            self._noticed += missing
        self.lose(min(lost, len(lines)))
