"""What a credential turned into, for as long as a request runs."""

from __future__ import annotations

from typing import Protocol

from service.auth.principal import Principal
from service.errors import ServiceError


class Grant(Protocol):
    """A credential that was verified. Belongs to the event loop's thread."""

    @property
    def principal(self) -> Principal: ...

    def refusal(self) -> ServiceError | None:
        """Why the same credential would be refused now (revoked, changed), or None. Cheap: memory only.

        A credential that merely expired while its request runs is not refused: it was valid when it asked.
        """


class Verifier(Protocol):
    """Turns one kind of credential into a grant. Belongs to the event loop's thread."""

    def recognises(self, credential: str) -> bool:
        """Whether the text has this kind's outer form. Looks at public form only; never raises."""

    async def verify(self, credential: str, address: str) -> Grant:
        """`address` is the client's, after trusted proxies. Raises Unauthorized or StorageUnavailable."""
