"""`x-request-timeout`: how long the client will wait, in queue, prefill and decode together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final

from fastapi import Header, Request

from service.api.deps import request_state
from service.errors import InvalidRequest

HEADER: Final = "x-request-timeout"

_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


async def client_timeout(
    request: Request,
    _: Annotated[
        str | None,
        Header(
            alias=HEADER,
            description="Seconds, decimal, that the whole request may take; capped by the plan and the service.",
            examples=["30"],
        ),
    ] = None,
) -> None:
    """Note it in the request's state. Raises InvalidRequest for what is not one positive decimal number."""
    request_state(request)["timeout"] = _seconds(request.headers.getlist(HEADER))


def _seconds(given: Sequence[str]) -> float | None:
    if not given:
        return None
    seconds = float(given[0]) if _SECONDS.fullmatch(given[0]) else 0.0
    if len(given) > 1 or not seconds:
        raise InvalidRequest(
            f"{HEADER} must be given once, as a positive number of seconds such as 30 or 2.5.",
            param=HEADER,
            code="invalid_value",
        )
    return seconds
