"""What a stranger's token may try is refused, each for its own reason, and nothing goes out."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.auth.header import credential_from
from service.auth.key_sets import open_issuer
from service.errors import Unauthorized
from service.settings import ConfigurationError, IssuerSettings
from tests.security.jwt_cases import CASES, Attacker, Attempt, Make, bearer
from tests.token_authority import Authority, ec_key, pack, sign_ec


@pytest.fixture
async def listener() -> AsyncIterator[tuple[str, list[Any]]]:
    """An address on this machine, and who connected to it."""
    seen: list[Any] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"http://127.0.0.1:{port}/keys", seen


async def outcome(attacker: Attacker, attempt: Attempt) -> str | None:
    """The reason of the refusal, None for none."""
    try:
        if isinstance(attempt, IssuerSettings):
            open_issuer(attempt)
            return None
        text = attempt if isinstance(attempt, str) else credential_from(attempt)
        await attacker.acme.verifier(*attacker.others).verify(text, "127.0.0.1")
    except Unauthorized as error:
        return error.reason if error.message == Unauthorized("any").message else "told the client why"
    except ConfigurationError as error:
        return str(error).rpartition(": ")[2]
    return None


@pytest.mark.parametrize(("reason", "makers"), CASES.values(), ids=CASES)
async def test_every_attempt_has_its_answer(
    reason: str | None, makers: tuple[Make, ...], listener: tuple[str, list[Any]], tmp_path: Path
) -> None:
    url, connections = listener
    for make in makers:
        attacker = Attacker(url, tmp_path)
        assert await outcome(attacker, make(attacker)) == reason
    assert connections == []


def test_the_table_has_all_85_cases() -> None:
    assert [int(name[:2]) for name in CASES] == list(range(1, 86))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_has_no_case(scheme: str, tmp_path: Path) -> None:
    attacker = Attacker("", tmp_path)
    assert await outcome(attacker, bearer(f"{scheme} {attacker.acme.token()}")) is None


async def test_the_listener_would_have_noticed(listener: tuple[str, list[Any]]) -> None:
    url, connections = listener
    host, _, port = url.removeprefix("http://").removesuffix("/keys").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await reader.read() == b""
    writer.close()
    assert len(connections) == 1


async def test_what_only_the_library_would_choke_on_is_counted_and_refused(tmp_path: Path) -> None:
    attacker = Attacker("", tmp_path)
    assert await outcome(attacker, attacker.odd("exp", None)) == "claims"
    assert attacker.acme.errors.places == ["jwt"]


async def test_an_escaped_nul_in_a_subject_is_refused_by_its_claim(tmp_path: Path) -> None:
    attacker = Attacker("", tmp_path)
    assert await outcome(attacker, attacker.raw(attacker.more('"jti2": "\\u0000"'))) is None
    assert await outcome(attacker, attacker.odd("jti", "\u0000")) == "claims"


async def test_a_denied_token_is_refused_however_it_is_written() -> None:
    """With ECDSA, (r, n - s) is a signature too: the same token in another text."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    acme = Authority()

    def mirrored(data: bytes) -> bytes:
        made = sign_ec(ec_key())(data)
        return made[:32] + (order - int.from_bytes(made[32:])).to_bytes(32)

    header = acme.header(alg="ES256", kid="e1")
    first, second = pack(header, acme.claims(), sign_ec(ec_key())), pack(header, acme.claims(), mirrored)
    verifier = acme.verifier()
    grants = [await verifier.verify(text, "") for text in (first, second)]
    assert grants[0].principal == grants[1].principal
    acme.denials.denied.add(("acme", "t1"))
    for text in (first, second):
        with pytest.raises(Unauthorized) as caught:
            await verifier.verify(text, "")
        assert caught.value.reason == "denied"
