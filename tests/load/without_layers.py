"""`mlxd` with its layers switched off, to measure what they cost: limits, usage, the line and the metrics of a request.

Authentication is switched off by the configuration (`auth.enabled`). For measuring alone: `docs/performance.md`.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from service.api.middleware.access import AccessLog
from service.api.middleware.request_rate import RequestRate
from service.cli import main
from service.limits.limiter import Limits


class Free:
    """Stands for what a request holds, and for its limits."""

    def settle(self, tokens: int) -> bool:
        return True

    def note(self, tokens: Any) -> None:
        """Nobody wants to know."""


async def _straight_through(self: Any, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        scope["state"]["standing"] = Free()
    await self._app(scope, receive, send)


async def _free(*_: Any, **__: Any) -> Free:
    return Free()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def switch_off() -> None:
    for layer in (AccessLog, RequestRate):
        layer.__call__ = _straight_through  # type: ignore[method-assign]
    stubs = {"reserve": _free, "note": _nothing, "check_prompt": _nothing, "check_output": _nothing}
    for name, stub in stubs.items():
        setattr(Limits, name, stub)
    for kind in (Counter, Gauge, Histogram):
        kind.labels = _itself  # type: ignore[method-assign]
        for method in ("inc", "dec", "set", "observe"):
            if hasattr(kind, method):
                setattr(kind, method, _nothing)


if __name__ == "__main__":
    switch_off()
    main()
