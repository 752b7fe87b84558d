"""Key sets over https, against a real server on loopback: rotation, and every way in which an address can be bad."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.auth.jwks import MAX_BYTES, KeySetError
from service.auth.jwks_https import HttpsSource, is_public, resolve, tls_context
from service.auth.jwt import Issuer, TokenVerifier
from service.auth.key_sets import URL_RETRY, KeySet, open_issuer
from service.errors import IssuerUnavailable, Unauthorized
from tests.https_server import HOST, Behaviour, HttpsServer, https_server, make_certificates, response
from tests.token_authority import (
    Authority,
    CountedErrors,
    FakeDenials,
    issuer_settings,
    key_set,
    pack,
    rsa_jwk,
    rsa_key,
)

OLD, NEW = rsa_jwk(rsa_key(), kid="r1"), rsa_jwk(rsa_key(1), kid="r2")
GOOD = response(key_set(OLD))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def server(certificates: tuple[Path, Path]) -> AsyncIterator[HttpsServer]:
    async with https_server(certificates, GOOD) as running:
        yield running


async def loopback(host: str, port: int) -> Sequence[str]:
    """A name server that knows one name."""
    assert host == HOST
    return ["127.0.0.1"]


def source_of(server: HttpsServer, **changes: object) -> HttpsSource:
    given: dict[str, object] = {"allow_private": True, "resolve": loopback, "timeout": 5.0, **changes}
    return HttpsSource(server.url, tls=tls_context(server.authorities), **given)  # type: ignore[arg-type]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def key_set_of(server: HttpsServer) -> tuple[KeySet, Clock]:
    clock = Clock()
    keys = KeySet("acme", source_of(server), ("RS256",), interval=600, retry=URL_RETRY, clock=clock, jitter=lambda: 0.0)
    return keys, clock


async def test_the_address_that_was_judged_is_asked_under_its_name(server: HttpsServer) -> None:
    """The system knows no `issuer.test`: had anything resolved it again, nothing would have come."""
    assert await source_of(server).load() == key_set(OLD)
    assert server.names == [HOST]
    [head] = server.heads
    assert head.startswith("GET /keys?set=1 HTTP/1.1\r\n")
    assert f"\r\nHost: {HOST}:{server.port}\r\n".lower() in head.lower()
    assert "accept-encoding: identity" in head.lower()


async def test_a_token_is_verified_with_a_key_from_the_address(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is configured, with the system's own resolver."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    acme = Authority()
    settings = issuer_settings(
        jwks_file=None,
        jwks_url=f"https://localhost:{server.port}/keys",
        jwks_ca_file=server.authorities,
        allow_private_addresses=True,
    )
    verifier = TokenVerifier([open_issuer(settings)], FakeDenials(), CountedErrors())
    grant = await verifier.verify(acme.token(), "")
    assert grant.principal.id == "acme:alice"
    assert verifier.health()["acme"].keys == 1


async def test_keys_rotate_with_an_overlap(server: HttpsServer) -> None:
    keys, clock = key_set_of(server)
    assert await keys.find("r1")
    server.behaviour = response(key_set(OLD, NEW))
    clock.now += URL_RETRY
    assert await keys.find("r2")
    assert await keys.find("r1")
    server.behaviour = response(key_set(NEW))
    await keys.refresh()
    assert await keys.find("r1") is None


async def test_a_flood_of_unknown_key_ids_is_one_connection(server: HttpsServer) -> None:
    acme = Authority()
    keys, clock = key_set_of(server)
    acme.keys = keys  # type: ignore[assignment]
    verifier = acme.verifier()
    await keys.refresh()
    clock.now += URL_RETRY
    tokens = [pack(acme.header(kid=f"k{number}"), acme.claims(), lambda _: b"x") for number in range(1000)]
    outcomes = await asyncio.gather(*(verifier.verify(token, "") for token in tokens), return_exceptions=True)
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Unauthorized)} == {"unknown_key"}
    assert len(outcomes) == 1000
    assert server.connections == 2, "one at the start, one for all of them"


async def test_many_who_need_the_first_keys_share_one_connection(server: HttpsServer) -> None:
    keys, _ = key_set_of(server)
    found = await asyncio.gather(*(keys.find("r1") for _ in range(50)))
    assert all(found)
    assert server.connections == 1


async def never(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drip(writer: asyncio.StreamWriter) -> None:
    """A byte now and then: no single read is slow enough to time out."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        await writer.drain()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


BOMB = response(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip")


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (endless, f"has more than {MAX_BYTES} bytes"),
        (response(b" " * (MAX_BYTES + 1)), f"has more than {MAX_BYTES} bytes"),
        (BOMB, "answered compressed"),
        (response(b"", "204 No Content"), "answered 204"),
        (response(key_set(OLD), "404 Not Found"), "answered 404"),
        (response(key_set(OLD), "503 Unavailable"), "answered 503"),
        (hang_up, "RemoteProtocolError: "),
        (response(b"not http", "x" * 70_000), "RemoteProtocolError: "),
    ],
)
async def test_a_bad_answer_is_no_key_set(behaviour: Behaviour, error: str, server: HttpsServer) -> None:
    server.behaviour = behaviour
    with pytest.raises(KeySetError) as caught:
        await source_of(server).load()
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize("behaviour", [never, drip])
async def test_a_slow_answer_ends_with_the_time_for_everything(behaviour: Behaviour, server: HttpsServer) -> None:
    server.behaviour = behaviour
    with pytest.raises(KeySetError, match=r"no answer within 0\.3 s"):
        await source_of(server, timeout=0.3).load()


async def test_a_name_server_that_does_not_answer_counts_too(server: HttpsServer) -> None:
    async def silent(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(KeySetError, match="no answer"):
        await source_of(server, resolve=silent, timeout=0.05).load()
    assert server.connections == 0


async def test_a_page_instead_of_keys_leaves_the_keys(server: HttpsServer) -> None:
    keys, _ = key_set_of(server)
    assert await keys.find("r1")
    server.behaviour = response(b"<!doctype html><title>Sign in</title>", "200 OK", "Content-Type: text/html")
    await keys.refresh()
    assert keys.health.error == "is not strict JSON"
    assert await keys.find("r1")


async def test_a_redirect_to_a_metadata_address_is_not_followed(
    server: HttpsServer, certificates: tuple[Path, Path]
) -> None:
    async with https_server(certificates, GOOD) as inside:
        for target in ("http://169.254.169.254/latest/meta-data/", f"https://127.0.0.1:{inside.port}/keys"):
            server.behaviour = response(b"", "302 Found", f"Location: {target}")
            with pytest.raises(KeySetError, match="answered 302"):
                await source_of(server).load()
        assert inside.connections == 0


async def test_an_address_that_is_down_at_the_start_is_503_until_it_is_up(certificates: tuple[Path, Path]) -> None:
    async with https_server(certificates, GOOD) as server:
        keys, clock = key_set_of(server)
        closed = HttpsServer(1, server.authorities, GOOD)
        keys._source = source_of(closed)
        with pytest.raises(IssuerUnavailable):
            await keys.find("r1")
        assert str(keys.health.error).startswith("ConnectError")
        keys._source = source_of(server)
        clock.now += URL_RETRY
        assert await keys.find("r1")


async def test_only_tokens_of_an_unavailable_issuer_are_503(server: HttpsServer) -> None:
    acme, other = Authority(), Authority()
    keys, _ = key_set_of(HttpsServer(1, server.authorities, GOOD))
    acme.keys = keys  # type: ignore[assignment]
    other.settings = issuer_settings(name="other", issuer="https://other.test/")
    verifier = acme.verifier(Issuer(other.settings, other.keys))
    with pytest.raises(IssuerUnavailable):
        await verifier.verify(acme.token(), "")
    assert (await verifier.verify(other.token(), "")).principal.id == "other:alice"


@pytest.mark.parametrize("authorities", ["foreign", "default"])
async def test_a_certificate_of_another_authority_is_refused(
    authorities: str, server: HttpsServer, tmp_path: Path
) -> None:
    trusted = make_certificates(tmp_path)[0] if authorities == "foreign" else None
    source = HttpsSource(server.url, tls=tls_context(trusted), allow_private=True, resolve=loopback)
    with pytest.raises(KeySetError, match="CERTIFICATE_VERIFY_FAILED"):
        await source.load()
    assert server.heads == []


async def test_a_certificate_for_another_name_is_refused(server: HttpsServer) -> None:
    async def anywhere(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    url = f"https://elsewhere.test:{server.port}/keys"
    source = HttpsSource(url, tls=tls_context(server.authorities), allow_private=True, resolve=anywhere)
    with pytest.raises(KeySetError, match="CERTIFICATE_VERIFY_FAILED"):
        await source.load()


async def test_tls_is_1_2_or_newer(server: HttpsServer) -> None:
    for context in (tls_context(None), tls_context(server.authorities)):
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["fe80::1%lo"]])
async def test_private_addresses_are_refused_before_anything_is_sent(found: list[str], server: HttpsServer) -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        return found

    with pytest.raises(KeySetError, match="allow_private_addresses is off"):
        await source_of(server, allow_private=False, resolve=resolver).load()
    assert server.connections == 0


async def test_the_system_resolver_is_judged_as_well(server: HttpsServer) -> None:
    url = f"https://localhost:{server.port}/keys"
    with pytest.raises(KeySetError, match="allow_private_addresses is off"):
        await HttpsSource(url, tls=tls_context(server.authorities), allow_private=False).load()
    assert server.connections == 0
    assert "127.0.0.1" in await resolve("localhost", 443)


async def test_the_next_address_is_tried_when_one_cannot_be_reached(server: HttpsServer) -> None:
    async def two(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]

    assert await source_of(server, resolve=two).load() == key_set(OLD)


async def test_a_name_without_an_address_is_told(server: HttpsServer) -> None:
    async def nothing(host: str, port: int) -> Sequence[str]:
        return []

    async def failing(host: str, port: int) -> Sequence[str]:
        raise OSError(2, "Name or service not known")

    for resolver, error in ((nothing, "has no address"), (failing, "cannot be resolved: Name or service not known")):
        with pytest.raises(KeySetError, match=error):
            await source_of(server, resolve=resolver).load()


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_places_on_the_internet_are_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1"),
        *("192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fc00::1", "fe80::1", "ff02::1", "ff0e::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    ],
)
def test_other_places_are_not_whatever_they_are_dressed_as(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


async def test_no_log_line_has_a_token(server: HttpsServer) -> None:
    acme = Authority()
    keys, clock = key_set_of(server)
    acme.keys = keys  # type: ignore[assignment]
    token = acme.token(claims={**acme.claims(sub="canary-7f3a"), "exp": None})
    with capture_logs() as lines:
        with pytest.raises(Unauthorized):
            await acme.verifier().verify(token, "")
        server.behaviour = hang_up
        clock.now += URL_RETRY
        await keys.find("canary-7f3a")
    assert [line["event"] for line in lines] == ["issuer_keys", "token_unverifiable", "issuer_keys_unavailable"]
    assert lines[1] == {"event": "token_unverifiable", "log_level": "info", "issuer": "acme", "kind": "TypeError"}
    assert not [part for part in (*token.split("."), "canary") if part in str(lines)]
