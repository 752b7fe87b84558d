"""Log lines for people, on a terminal. Pure; any thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def as_console(*, colors: bool) -> Callable[[dict[str, Any]], str]:
    """Makes a line of its fields; control characters are shown, not obeyed."""
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def render(fields: dict[str, Any]) -> str:
        seen: dict[str, Any] = {name: _visible(value) for name, value in fields.items()}
        if isinstance(stacks := fields.get("exception"), list):
            seen["exception"] = "\n".join(_visible(line) for line in _traceback(stacks))
        return str(renderer(None, fields["level"], seen))

    return render


def _visible(value: Any) -> Any:
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], value) if isinstance(value, str) else value


def _traceback(stacks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """An exception in Python's form, its causes first."""
    for stack in reversed(stacks):
        yield "Traceback (most recent call last):"
        for frame in stack["frames"]:
            yield f'  File "{frame["filename"]}", line {frame["lineno"]}, in {frame["name"]}'
        yield f"{stack['exc_type']}: {stack['exc_value']}"
        for inner in stack.get("exceptions", ()):
            yield from (f"  | {line}" for line in _traceback(inner))
