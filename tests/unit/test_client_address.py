"""Whose address counts: the peer's, unless a proxy of ours says otherwise."""

from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service.api.middleware.client import MAX_HOPS, ClientAddress

pytestmark = pytest.mark.anyio

TRUSTED = ("10.0.0.0/8", "fd00::/8", "127.0.0.1/32")


async def seen(peer: Any, *forwarded: str, trusted: tuple[str, ...] = TRUSTED) -> Any:
    """What the application sees as its client."""
    found: list[Any] = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        found.append(scope.get("client"))

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    await ClientAddress(app, trusted=trusted)({"type": "http", "client": peer, "headers": headers}, nothing, nothing)
    return found[0]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # spoofed by a stranger
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),  # the client wrote the first one itself
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1 ,\t10.9.9.9"], "198.51.100.1"),
        ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),  # everybody is ours: the farthest
        ("10.0.0.1", ["not an address, 198.51.100.1"], "198.51.100.1"),  # beyond the answer nothing is read
        ("10.0.0.1", ["198.51.100.1, rubbish"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1,"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1:443"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("fd00::1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("::ffff:203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [", ".join(["198.51.100.1"] + ["10.0.0.2"] * (MAX_HOPS - 1))], "198.51.100.1"),
        ("10.0.0.1", [", ".join(["198.51.100.1"] + ["10.0.0.2"] * MAX_HOPS)], "10.0.0.2"),
        ("10.0.0.1", ["\xe9"], "10.0.0.1"),
    ],
)
async def test_the_nearest_address_that_is_no_proxy_of_ours(peer: str, forwarded: list[str], address: str) -> None:
    assert (await seen((peer, 4711), *forwarded))[0] == address


async def test_nobody_is_trusted_unless_configured() -> None:
    assert await seen(("127.0.0.1", 4711), "198.51.100.1", trusted=()) == ("127.0.0.1", 4711)


async def test_the_port_is_known_of_the_peer_only() -> None:
    assert await seen(("10.0.0.1", 4711)) == ("10.0.0.1", 4711)
    assert await seen(("10.0.0.1", 4711), "198.51.100.1") == ("198.51.100.1", 0)


@pytest.mark.parametrize("peer", [None, ("/run/socket", 0)])
async def test_what_has_no_address_stays_as_it_is(peer: Any) -> None:
    assert await seen(peer, "198.51.100.1") == peer
