"""Requests that run on a credential which may be revoked meanwhile.

A stream may last for minutes: what was true when it began is looked at again whenever keys or the deny-list change.
Belongs to the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.auth.grant import Grant
from service.errors import ServiceError
from service.observability.logging import get_logger

log = get_logger(__name__)

End = Callable[[ServiceError], None]


class RunningGrants:
    """Every request that generates, with what ends it."""

    def __init__(self) -> None:
        self._running: dict[object, tuple[Grant, End]] = {}

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def watching(self, grant: Grant, end: End) -> Iterator[None]:
        """While the block runs, `end` is called once with the error if the grant is refused.

        Raises that error when it is refused already: a change may have come after the credential was verified.
        """
        if refusal := grant.refusal():
            raise refusal
        place = object()
        self._running[place] = (grant, end)
        try:
            yield
        finally:
            self._running.pop(place, None)

    def recheck(self) -> None:
        """End what is refused now. To be called after every change; memory only."""
        refused = [(place, end, why) for place, (grant, end) in self._running.items() if (why := grant.refusal())]
        for place, end, why in refused:
            del self._running[place]
            end(why)
        if refused:
            log.info("running_requests_refused", count=len(refused))
