"""From headers to a grant, before any kind of credential is looked at closely."""

import pytest
import structlog

from service.auth.authenticator import Authenticator
from service.auth.header import MAX_BYTES, credential_from
from service.auth.principal import LOCAL
from service.errors import Unauthorized
from tests.fakes_auth import FakeGrant, FakeVerifier

pytestmark = pytest.mark.anyio

BEARER = (b"authorization", b"Bearer fake-1")
API_KEY = (b"x-api-key", b"fake-1")


@pytest.mark.parametrize(
    "header",
    [BEARER, API_KEY, (b"authorization", b"bearer fake-1"), (b"authorization", b"BEARER fake-1")],
)
def test_a_credential_stands_in_one_of_two_headers(header: tuple[bytes, bytes]) -> None:
    assert credential_from([(b"host", b"localhost"), header]) == "fake-1"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([(b"cookie", b"x-api-key=fake-1")], "missing"),
        ([BEARER, BEARER], "ambiguous"),
        ([BEARER, API_KEY], "ambiguous"),
        ([API_KEY, API_KEY], "ambiguous"),
        ([(b"authorization", b"")], "malformed"),
        ([(b"authorization", b"fake-1")], "malformed"),
        ([(b"authorization", b"Bearer")], "malformed"),
        ([(b"authorization", b"Bearer ")], "malformed"),
        ([(b"authorization", b"Bearer  fake-1")], "malformed"),
        ([(b"authorization", b"Bearer fake-1 fake-2")], "malformed"),
        ([(b"authorization", b"Bearer\tfake-1")], "malformed"),
        ([(b"authorization", b"Basic ZmFrZS0xOg==")], "malformed"),
        ([(b"x-api-key", b"")], "malformed"),
        ([(b"x-api-key", b"fake-1\x00")], "malformed"),
        ([(b"x-api-key", b"fake-1\r\nx: y")], "malformed"),
        ([(b"x-api-key", "fake-é".encode())], "malformed"),
        ([(b"x-api-key", b"fake-\xff")], "malformed"),
        ([(b"x-api-key", b"f" * (MAX_BYTES + 1))], "malformed"),
    ],
)
def test_anything_else_is_no_credential(headers: list[tuple[bytes, bytes]], reason: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        credential_from(headers)
    assert refused.value.reason == reason


async def test_the_first_verifier_that_recognises_it_decides() -> None:
    class Other(FakeVerifier):
        def recognises(self, credential: str) -> bool:
            return False

    grant, other = FakeGrant(), Other()
    verifier = FakeVerifier({"fake-1": grant})
    found = await Authenticator([other, verifier]).authenticate([BEARER], "203.0.113.9")
    assert found is grant
    assert (other.addresses, verifier.addresses) == ([], ["203.0.113.9"])


async def test_what_no_verifier_recognises_is_malformed() -> None:
    with pytest.raises(Unauthorized) as refused:
        await Authenticator([FakeVerifier()]).authenticate([(b"x-api-key", b"sk-else")], "203.0.113.9")
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize("headers", [[], [BEARER], [BEARER, API_KEY]])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1"])
async def test_where_it_is_off_everybody_on_this_machine_is_local(
    headers: list[tuple[bytes, bytes]], address: str
) -> None:
    grant = await Authenticator([], enabled=False).authenticate(headers, address)
    assert grant.principal is LOCAL
    assert grant.refusal() is None


@pytest.mark.parametrize("address", ["203.0.113.9", "10.0.0.1", "", "x"])
async def test_where_it_is_off_nobody_else_comes_in(address: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        await Authenticator([], enabled=False).authenticate([BEARER], address)
    assert refused.value.reason == "not_local"


def test_that_it_is_off_is_said_loudly() -> None:
    with structlog.testing.capture_logs() as lines:
        Authenticator([]).announce()
        assert lines == []
        Authenticator([], enabled=False).announce()
    assert [(line["event"], line["log_level"]) for line in lines] == [("authentication_off", "warning")]
