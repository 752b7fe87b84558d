"""One formatter for everything that logs: structlog's events, the standard library's and uvicorn's.

Event names are snake_case and say what happened; everything else is a field. Never a prompt, an output, a
key or a token. `configure` is called once, by the command line, before anything else runs; any thread may log.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO

import structlog
from structlog.processors import ExceptionRenderer
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.types import EventDict, Processor, WrappedLogger

Format = Literal["auto", "json", "console"]


_SECRET = re.compile(
    r"(mlxd_[a-z][a-z0-9]{0,11}_[0-9A-Za-z]{12}_)[0-9A-Za-z]{32}_[0-9A-Za-z]{6}"
    r"|(eyJ[0-9A-Za-z_-]{5,}\.)[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]*)?"
)
"""An API key and a JWT, wherever in a line they stand; what goes before the secret part is kept."""


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a line is written: rich puts it above a spinner that is being drawn."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """The base class sets it once; there is nothing to keep."""


def get_logger(name: str) -> BoundLogger:
    """A logger for the module `name`; it takes its configuration at the first event, not here."""
    logger: BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def configure(*, level: str = "info", fmt: Format = "auto", stream: TextIO | None = None) -> None:
    """Send all logging of the process through one handler on `stream` (standard error when not given).

    Replaces the root logger's handlers; loggers of libraries keep none of their own and propagate.
    """
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    as_json = fmt == "json" or (fmt == "auto" and not terminal)
    shared = _shared_processors()
    structlog.configure(
        processors=[*shared, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    # Only a terminal is looked up anew: rich would take lines that go to a file to the terminal of its spinner.
    handler = _StderrHandler() if stream is None and terminal else logging.StreamHandler(out)
    processors = _render(as_json=as_json, colors=terminal)
    handler.setFormatter(ProcessorFormatter(foreign_pre_chain=shared, processors=processors))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
    # One canonical line per request is ours (api/middleware/access.py); uvicorn's would be a second one.
    logging.getLogger("uvicorn.access").disabled = True


def _shared_processors() -> Sequence[Processor]:
    return (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _drop_uvicorn_extras,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    )


def _render(*, as_json: bool, colors: bool) -> Sequence[Processor]:
    if as_json:
        return (
            ProcessorFormatter.remove_processors_meta,
            # Without the frames' local variables: a prompt is one of them. structlog's own default shows them.
            ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
            _redact,
        )
    plain = structlog.dev.plain_traceback  # also without local variables
    console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)
    return (ProcessorFormatter.remove_processors_meta, console, _redact)


def _redact(_: WrappedLogger, __: str, line: Any) -> str:
    """The last line of defence: nobody logs a credential, and if somebody does (LiteLLM #34710), it is not there."""
    return _SECRET.sub(lambda found: f"{found[1] or found[2]}[redacted]", str(line))


def _drop_uvicorn_extras(_: WrappedLogger, __: str, event_dict: EventDict) -> EventDict:
    """Drop the second, coloured copy of its message that uvicorn hands over."""
    extras: Any = event_dict
    extras.pop("color_message", None)
    return event_dict
