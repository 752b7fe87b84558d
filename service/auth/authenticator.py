"""From a credential's text to a grant: which kind it is, and everybody's grant where authentication is off."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.auth.grant import Grant, Verifier
from service.auth.header import credential_from
from service.auth.principal import LOCAL, Principal
from service.errors import ServiceError, Unauthorized
from service.observability.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LocalGrant:
    """What everybody holds where authentication is off; never refused."""

    principal: Principal = LOCAL

    def refusal(self) -> ServiceError | None:
        return None


class Authenticator:
    """Asks the first of `verifiers` that recognises a credential. Belongs to the event loop's thread.

    With `enabled` false everybody on this machine is LOCAL, whatever they show.
    """

    def __init__(self, verifiers: Sequence[Verifier], *, enabled: bool = True) -> None:
        self._verifiers = tuple(verifiers)
        self._enabled = enabled

    def announce(self) -> None:
        """Say loudly, once at start, when nobody is asked for a credential."""
        if not self._enabled:
            log.warning("authentication_off", meaning="every process on this machine may do everything")

    async def authenticate(self, headers: Iterable[tuple[bytes, bytes]], address: str) -> Grant:
        """The grant of a client at `address` that sent `headers`. Raises Unauthorized or StorageUnavailable."""
        if not self._enabled:
            return _local(address)
        credential = credential_from(headers)
        for verifier in self._verifiers:
            if verifier.recognises(credential):
                return await verifier.verify(credential, address)
        raise Unauthorized("malformed")


def _local(address: str) -> Grant:
    """Everybody's grant on this machine; a proxy here may speak for another one, and those stay outside."""
    if not _is_loopback(address):
        raise Unauthorized("not_local")
    return LocalGrant()


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
