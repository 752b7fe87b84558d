"""Where the configuration says that the service is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.settings import Settings


def configured(settings: Settings) -> str | None:
    """The operator's listener if its port is known, else the public one; None where both ports are free ones."""
    from service.console import url

    ops, server = settings.ops, settings.server
    tls = server.tls_certificate is not None
    host, port = ops.address or ("", 0)
    if port:
        return url(_reachable(host), port, tls=tls and not ops.loopback)
    if server.port:
        return url(_reachable(server.host), server.port, tls=tls)
    return None


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - an address to ask, not to listen on
