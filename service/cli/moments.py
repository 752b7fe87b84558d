"""Times as people write them: an ISO date or time (UTC when it names no zone), or a duration such as 90d."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from types import MappingProxyType

import typer

UNITS = MappingProxyType({"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800})
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])", re.ASCII)


def duration(option: str, text: str) -> float:
    """Seconds. Raises typer.BadParameter about `option`."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter("not a duration: 30s, 15m, 12h, 90d or 52w", param_hint=option)
    return float(int(found[1]) * UNITS[found[2]])


def moment(option: str, text: str | None, now: float) -> float | None:
    """Seconds since the epoch; a duration counts from `now`. Raises typer.BadParameter about `option`."""
    if text is None:
        return None
    if _DURATION.fullmatch(text):
        return now + duration(option, text)
    try:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise typer.BadParameter("neither an ISO date or time nor a duration such as 90d", param_hint=option) from None
