"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """`fail`: the service cannot start like this, or is not safe. `warn`: it works, and not as well as it should.

    `skipped`: nothing could be looked at here; what was seen says why.
    """

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `mend` is a command or a sentence; empty where there is nothing to mend."""

    name: str
    verdict: Verdict
    seen: str
    mend: str = ""


def ok(name: str, seen: str) -> Finding:
    """All is well."""
    return Finding(name, Verdict.OK, seen)


def warn(name: str, seen: str, mend: str) -> Finding:
    """It works, and not as well as it should."""
    return Finding(name, Verdict.WARN, seen, mend)


def fail(name: str, seen: str, mend: str) -> Finding:
    """It cannot start like this, or is not safe."""
    return Finding(name, Verdict.FAIL, seen, mend)


def skipped(name: str, seen: str, mend: str = "") -> Finding:
    """Nothing could be looked at; `seen` says why."""
    return Finding(name, Verdict.SKIPPED, seen, mend)


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:  # noqa: PLR2004 - a thousand is a thousand
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if abs(count) < 1000 else f"{count / 1000:.3g} TB"  # noqa: PLR2004
