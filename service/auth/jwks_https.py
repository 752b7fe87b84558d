"""A key set from an https address, asked for as if the address were hostile: bounded, and bound to where it leads.

No redirects, no proxies of the environment, no compression; MAX_BYTES and `timeout` for everything together. The
host is resolved once, every address is judged, and the connection goes to an address that was judged: a name that
resolves differently a moment later (DNS rebinding) changes nothing. TLS still proves the name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx

from service.auth.jwks import MAX_BYTES, KeySetError
from service.settings import ConfigurationError

TIMEOUT = 3.0
MAX_ADDRESSES = 4

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_NAT64 = 0x0064_FF9B << 64
"""The upper 96 bits of `64:ff9b::/96` (RFC 6052), whose lower 32 are an IPv4 address."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, in the system's order. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: Address) -> bool:
    """Whether an address is a place on the internet, also when it is an IPv4 address in an IPv6 one's clothes."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour]
        if int(address) >> 32 == _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(each) for each in inner if each is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def tls_context(authorities: Path | None) -> ssl.SSLContext:
    """Trusts the authorities of a PEM file, or those that httpx brings along. Raises ConfigurationError."""
    if authorities is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:  # ssl.SSLError too
        raise ConfigurationError(f"{authorities}: holds no certificates that can be used: {error.strerror}") from None


class HttpsSource:
    """See `key_sets.Source`; every call asks anew. Belongs to the event loop's thread."""

    def __init__(
        self,
        url: str,
        *,
        tls: ssl.SSLContext,
        allow_private: bool,
        resolve: Resolve = resolve,
        timeout: float = TIMEOUT,
    ) -> None:
        self._url = httpx.URL(url)
        self._tls = tls
        self._allow_private = allow_private
        self._resolve = resolve
        self._timeout = timeout
        self.date: str | None = None
        """The `Date` of the last answer: the time as it is over there."""

    async def load(self) -> bytes:
        """The document. Raises KeySetError."""
        try:
            async with asyncio.timeout(self._timeout):
                addresses = await self._addresses()
                return await self._ask(addresses)
        except TimeoutError:
            raise KeySetError(f"no answer within {self._timeout:g} s") from None
        except OSError as error:
            raise KeySetError(f"cannot be resolved: {error.strerror}") from None
        except httpx.HTTPError as error:
            raise KeySetError(f"{type(error).__name__}: {error}") from None

    async def _addresses(self) -> list[str]:
        found = await self._resolve(self._url.host, self._url.port or 443)
        if not found:
            raise KeySetError("has no address")
        for text in found if not self._allow_private else ():
            if not is_public(ipaddress.ip_address(text)):
                raise KeySetError(f"leads to {text}, and allow_private_addresses is off")
        return list(found[:MAX_ADDRESSES])

    async def _ask(self, addresses: list[str]) -> bytes:
        """The first of `addresses` that can be connected to answers."""
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=0)
        timeout = httpx.Timeout(self._timeout, connect=self._timeout / len(addresses))
        async with httpx.AsyncClient(verify=self._tls, trust_env=False, limits=limits, timeout=timeout) as client:
            for address in addresses[:-1]:
                try:
                    return await self._get(client, address)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
            return await self._get(client, addresses[-1])

    async def _get(self, client: httpx.AsyncClient, address: str) -> bytes:
        request = client.build_request(
            "GET",
            self._url.copy_with(host=address),
            headers={"host": self._url.netloc.decode("ascii"), "accept-encoding": "identity"},
            extensions={"sni_hostname": self._url.host},
        )
        response = await client.send(request, stream=True, follow_redirects=False)
        self.date = response.headers.get("date")
        try:
            if response.status_code != httpx.codes.OK:
                raise KeySetError(f"answered {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise KeySetError("answered compressed")
            document = bytearray()
            async for chunk in response.aiter_raw():
                document += chunk
                if len(document) > MAX_BYTES:
                    raise KeySetError(f"has more than {MAX_BYTES} bytes")
            return bytes(document)
        finally:
            await response.aclose()
