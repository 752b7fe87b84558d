"""One way out for everything that logs: structlog's events, the standard library's and uvicorn's.

Event names are snake_case and say what happened; everything else is a field. Never a prompt, an output, a key or a
token: `redaction.py` has what is done about those that get here all the same. Libraries are heard from `warning` up.
`configure` is called once, by the command line, before anything else runs; any thread may log, and none ever waits
for whoever reads (`log_queue.py`). What must be known at the moment of logging (the log context, an exception, the
values) is put together there; the line is made of it on the writer's thread. Our own events go to the handler
directly: each request has one, and the standard library's way there takes as long as all the rest of it.
"""

from __future__ import annotations

import itertools
import json
import logging
import logging.handlers
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, FilteringBoundLogger

from service.observability.log_console import as_console
from service.observability.log_file import LogFile
from service.observability.log_queue import END_TIMEOUT, Descriptor, LineWriter, Outlet, Stream
from service.observability.redaction import MAX_ITEMS, cut, plain, redact, without_words

Format = Literal["auto", "json", "console"]
Level = Literal["debug", "info", "warning", "error"]
Fields = dict[str, Any]

QUEUE_LINES: Final = 4096

MAX_LINE: Final = 32 * 1024
"""Characters of one line. Of a longer one its beginning is kept, as a text in the field `cut`."""
MAX_FRAMES: Final = 30

_LEVELS = MappingProxyType({name.lower(): number for name, number in logging.getLevelNamesMapping().items()})


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger for the module `name`; it takes its configuration at each event, not here."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def configure(
    *,
    level: Level = "info",
    fmt: Format = "auto",
    stream: TextIO | None = None,
    queue_lines: int = QUEUE_LINES,
    file: Path | None = None,
) -> None:
    """Send all logging of the process through one handler to `file`, or `stream` (standard error when not given).

    Replaces the root logger's handlers; loggers of libraries keep none of their own and propagate. At most
    `queue_lines` lines wait to be written. Raises OSError for a file that cannot be opened.
    """
    terminal = file is None and (stream or sys.stderr).isatty()
    as_json = fmt == "json" or (fmt == "auto" and not terminal)
    structlog.configure(
        processors=[_at_level, structlog.contextvars.merge_contextvars, _with_level],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),  # the level may change: `_at_level`
        logger_factory=_Handed,
        cache_logger_on_first_use=False,
    )
    outlet = _outlet(stream) if file is None else LogFile(file)
    root = logging.getLogger()
    for former in _queued():
        former.flush()
        former.close()
    root.handlers = [QueuedHandler(outlet, json.dumps if as_json else as_console(colors=terminal), queue_lines)]
    set_level(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
    # One canonical line per request is ours (api/middleware/access.py); uvicorn's would be a second one.
    logging.getLogger("uvicorn.access").disabled = True


def set_level(level: Level) -> None:
    """What is logged from now on; does not survive the process. Any thread may call."""
    logging.getLogger().setLevel(level.upper())


def current_level() -> str:
    """The level that is in force."""
    return logging.getLevelName(logging.getLogger().level).lower()


def reopen() -> None:
    """Go on in what is at the path of the file by now, where there is one. Any thread. Raises OSError: as before."""
    for handler in _queued():
        if isinstance(handler.outlet, LogFile):
            handler.outlet.reopen()


def flush() -> None:
    """Wait until what was logged before is written, for a bounded time."""
    for handler in _queued():
        handler.flush()


def lines_dropped() -> int:
    """Lines that were dropped or could not be written since the process began."""
    return sum(handler.writer.dropped for handler in _queued())


def line_writer(stream: TextIO) -> Callable[[str], None]:
    """Writes lines to `stream` as the log is written: in one order with it, and without waiting.

    Before `configure` they are written at once.
    """
    outlet = Stream(lambda: stream) if stream.isatty() else _outlet(stream)

    def write(line: str) -> None:
        queued = _queued()
        if queued:
            queued[0].writer.put(lambda: f"{line}\n", outlet)
        else:
            outlet.write([f"{line}\n"])

    return write


def log_uncaught() -> None:
    """Send warnings, and exceptions that nobody caught, through the log too. For a process of our own."""
    log = get_logger(__name__)
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *exc_info: log.critical("uncaught_exception", exc_info=exc_info)
    sys.unraisablehook = lambda found: log.error("unraisable_exception", exc_info=found.exc_value)
    threading.excepthook = lambda found: log.error(
        "uncaught_exception", thread=found.thread and found.thread.name, exc_info=found.exc_value
    )


class _Event(NamedTuple):
    """One of ours, as structlog hands it over."""

    logger: str
    level: str
    said: Fields


class QueuedHandler(logging.handlers.QueueHandler):
    """Takes what a line will say at the moment of logging, and hands it to the writer's thread."""

    def __init__(self, outlet: Outlet, render: Callable[[Fields], str], capacity: int) -> None:
        self.outlet = outlet
        self.writer = LineWriter(outlet, capacity=capacity, notice=self._notice)
        self._render = render
        super().__init__(self.writer)  # type: ignore[arg-type]  # `enqueue` below is all that uses it
        self._exception = ExceptionDictTransformer(show_locals=False, max_frames=MAX_FRAMES)

    def filter(self, record: logging.LogRecord) -> Any:
        """Libraries from `warning` up."""
        return record.levelno >= logging.WARNING and super().filter(record)

    def prepare(self, record: logging.LogRecord | _Event) -> Any:
        """What the line says, as values that belong to nobody else."""
        if isinstance(record, _Event):
            return self._put_together(
                {"timestamp": time.time(), "level": record.level, "logger": record.logger}, record.said
            )
        about = {"timestamp": record.created, "level": record.levelname.lower(), "logger": record.name}
        said = {"event": _message(record), **structlog.contextvars.get_contextvars(), "exc_info": record.exc_info}
        return self._put_together(about, said)

    def enqueue(self, record: Any) -> None:
        self.writer.put(partial(_line, self._render, record))

    def _put_together(self, about: Fields, said: Fields) -> Fields:
        given = said.pop("exc_info", None)
        fields = {name: plain(value) for name, value in itertools.islice(said.items(), MAX_ITEMS)}
        if (exc_info := _exc_info(given)) is not None:
            fields["exception"] = without_words(self._exception(exc_info))
        return {**about, "event": "", **fields, **about}

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 -- the standard library's name
        """A line that could not be put together, as one whose arguments do not fit, is counted with the lost ones."""
        self.writer.lose()

    def flush(self) -> None:
        """Wait until what was logged before is written, for a bounded time."""
        self.writer.flush()

    def close(self) -> None:
        """To be flushed before, as `logging.shutdown` does: what stalls then is not waited for again."""
        self.writer.close(END_TIMEOUT)
        super().close()

    def _notice(self, missing: int) -> str:
        about = {"timestamp": time.time(), "level": "warning", "logger": __name__}
        return _line(self._render, {**about, "event": "log_lines_dropped", "lines": missing})


class _Handed:
    """Where structlog's events of the logger `name` end: with the handler."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def _take(self, level: str, said: Fields) -> None:
        event = _Event(self._name, level, said)
        for handler in _queued():
            handler.emit(event)  # type: ignore[arg-type]  # hands it to `prepare` and `enqueue`, and bears what they raise

    debug = info = warning = error = critical = _take


def _at_level(_: Any, method: str, event: EventDict) -> EventDict:
    """Drops what is below the level that is in force."""
    if _LEVELS[method] < logging.getLogger().level:
        raise structlog.DropEvent
    return event


def _with_level(_: Any, method: str, event: EventDict) -> tuple[tuple[str, EventDict], EventDict]:
    """What structlog calls the logger's method with."""
    return (method, event), {}


def _queued() -> list[QueuedHandler]:
    """What `configure` installed: none before it."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, QueuedHandler)]


def _outlet(stream: TextIO | None) -> Outlet:
    """Standard error, when no stream is given.

    Only a terminal is looked up anew: rich would take lines that go to a file to the terminal of its spinner.
    """
    if stream is None:
        if sys.stderr.isatty():
            return Stream(lambda: sys.stderr)
        stream = sys.stderr
    try:
        return Descriptor(stream.fileno())
    except (OSError, ValueError):  # it has none, or is closed
        return Stream(lambda: stream)


def _message(record: logging.LogRecord) -> str:
    """A library's own words. asyncio adds the representation of a task, and with it what its exception says."""
    text = record.getMessage()
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _exc_info(given: Any) -> Any:
    """The triple of an exception, of an event's `exc_info` in any of its forms; None where there is none."""
    if isinstance(given, BaseException):
        return type(given), given, given.__traceback__
    found = given if isinstance(given, tuple) else sys.exc_info() if given else (None,)
    return None if found[0] is None else found


def _line(render: Callable[[Fields], str], fields: Fields) -> str:
    at = datetime.fromtimestamp(fields["timestamp"], UTC)
    fields["timestamp"] = at.isoformat(timespec="microseconds").replace("+00:00", "Z")
    line = redact(render(fields))
    if len(line) > MAX_LINE:
        kept = ("timestamp", "level", "logger", "event", "request_id")
        short = {name: cut(str(fields[name]), MAX_LINE // 64) for name in kept if name in fields}
        line = redact(render({**short, "cut": line[: MAX_LINE // 4]}))
    return f"{line}\n"
