"""Which trace a request belongs to, as its headers say: W3C Trace Context (https://www.w3.org/TR/trace-context/).

What is malformed is ignored as the recommendation asks, and never an error: a trace is no reason to fail a request.
Nothing here needs OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*)?"
)
_KEY = r"[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e])")
_SPACE = " \t"

MAX_STATE = 512
"""Characters of `tracestate` that are kept; a longer one is dropped. The least that the recommendation asks for."""

MAX_MEMBERS = 32


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's span. `trace_id` is 32 and `span_id` 16 lower-case hexadecimal digits, neither all zero.

    Bit 0 of `flags`: the caller records this trace. `state` is what tracing vendors pass along.
    """

    trace_id: str
    span_id: str
    flags: int
    state: tuple[tuple[str, str], ...] = ()


def trace_parent(traceparent: Sequence[str], tracestate: Sequence[str]) -> TraceParent | None:
    """The caller's span of these header values; None where there is none, or not exactly one, or it is malformed."""
    if len(traceparent) != 1:
        return None
    found = _PARENT.fullmatch(traceparent[0].strip(_SPACE))
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "00" and more is not None:
        return None  # a later version may say more, this one says all
    return TraceParent(trace_id, span_id, int(flags, 16), _state(tracestate))


def _state(values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The members in order; none at all when one is malformed or comes twice, or when they are too many."""
    text = ",".join(values)
    if not text or len(text) > MAX_STATE:
        return ()
    members = [member for each in text.split(",") if (member := each.strip(_SPACE))]
    pairs = [(match[1], match[2]) for member in members if (match := _MEMBER.fullmatch(member))]
    if len(pairs) < len(members) or len(pairs) > MAX_MEMBERS or len(dict(pairs)) < len(pairs):
        return ()
    return tuple(pairs)
