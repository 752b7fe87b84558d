"""The client's address, seen through the proxies in front of the service, and through no others.

uvicorn's own reading trusts 127.0.0.1 by default and, with `*`, whatever the client wrote first; it is off.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_HOPS = 16
"""Proxies that a request may have come through; the rest of the header is not read."""

Address = IPv4Address | IPv6Address


class ClientAddress:
    """Sets the scope's `client`. `trusted` are networks (CIDR) of proxies.

    X-Forwarded-For counts only when the connection comes from a trusted proxy. It is read from the right, where
    the nearest proxy wrote: the first address that is no proxy of ours is the client's. Where that cannot be
    read, the client is the peer itself.
    """

    def __init__(self, app: ASGIApp, *, trusted: tuple[str, ...]) -> None:
        self._app = app
        self._trusted: tuple[IPv4Network | IPv6Network, ...] = tuple(map(ipaddress.ip_network, trusted))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("client"):
            peer, port = scope["client"]
            address = _read(peer)
            if address is not None:
                origin = self._origin(address, Headers(scope=scope).getlist("x-forwarded-for"))
                scope["client"] = (str(origin), port if origin == address else 0)
        await self._app(scope, receive, send)

    def _origin(self, peer: Address, forwarded: list[str]) -> Address:
        if not forwarded or not self._trusts(peer):
            return peer
        hops = ",".join(forwarded).rsplit(",", MAX_HOPS)[-MAX_HOPS:]
        nearest = peer
        for hop in reversed(hops):
            address = _read(hop.strip(" \t"))
            if address is None:
                return peer
            nearest = address
            if not self._trusts(address):
                break
        return nearest

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _read(text: str) -> Address | None:
    """An address as it is written bare; IPv4 that came through an IPv6 socket is IPv4 again."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
