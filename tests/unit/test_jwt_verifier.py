"""From a good token to a grant: steps, denials while it is used, several issuers, and what it costs."""

import subprocess
import sys
import time
from typing import Any

import pytest
from jose import jwt as library  # type: ignore[import-untyped]

from service.auth.jwt import Issuer, TokenVerifier, bind, sign
from service.auth.key_sets import SecretKey
from service.auth.principal import Scope
from service.auth.token_issue import issue
from service.errors import CredentialRevoked, InvalidRequest, StorageUnavailable, Unauthorized
from tests.conftest import ROOT
from tests.token_authority import SECRET, Authority, issuer_settings, pack, secret_issuer, sign_hmac


async def test_a_good_token_becomes_a_principal() -> None:
    acme = Authority()
    grant = await acme.verifier().verify(acme.token(), "192.0.2.1")
    who = grant.principal
    assert (who.id, who.tenant, who.plan, who.key_id) == ("acme:alice", "acme:alice", "default", "acme")
    assert who.scopes == {Scope.INFERENCE, Scope.MODELS}, "admin was asked for, and is not given"
    assert grant.refusal() is None


async def test_the_operator_hears_of_every_step() -> None:
    acme = Authority()
    steps: list[str] = []
    await acme.verifier().examine(acme.token(), steps.append)
    assert steps == ["form", "issuer", "header", "key", "signature", "claims", "deny-list", "grants"]


async def test_a_running_request_learns_of_a_denial_but_not_of_expiry() -> None:
    acme = Authority()
    grant = await acme.verifier().verify(acme.token(), "")
    acme.now += 100_000
    assert grant.refusal() is None
    acme.denials.denied.add(("acme", "alice"))
    refusal = grant.refusal()
    assert isinstance(refusal, CredentialRevoked)
    assert (refusal.code, refusal.reason) == ("credential_revoked", "denied")


async def test_without_a_readable_deny_list_a_good_token_is_503_and_a_bad_one_401() -> None:
    acme = Authority()
    acme.denials.error = StorageUnavailable("no")
    with pytest.raises(StorageUnavailable):
        await acme.verifier().verify(acme.token(), "")
    with pytest.raises(Unauthorized):
        await acme.verifier().verify(acme.token(claims=acme.claims(aud="x")), "")


async def test_several_issuers_are_told_apart_by_iss() -> None:
    acme, dev = Authority(), secret_issuer()
    verifier = acme.verifier(dev)
    token = pack({"alg": "HS256", "typ": "JWT"}, acme.claims(iss="dev"), sign_hmac(SECRET))
    assert (await verifier.verify(token, "")).principal.id == "dev:alice"
    assert (await verifier.verify(acme.es_token(), "")).principal.id == "acme:alice"
    assert sorted(verifier.health()) == ["acme", "dev"]


async def test_a_secret_takes_no_key_id() -> None:
    acme = Authority()
    verifier = TokenVerifier(
        [Issuer(secret_issuer().settings, SecretKey(SECRET))], acme.denials, acme.errors, now=lambda: acme.now
    )
    token = pack({"alg": "HS256", "typ": "JWT", "kid": "x"}, acme.claims(iss="dev"), sign_hmac(SECRET))
    with pytest.raises(Unauthorized) as caught:
        await verifier.verify(token, "")
    assert caught.value.reason == "unknown_key"


async def test_whatever_the_library_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    acme = Authority()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(acme.token())

    monkeypatch.setattr(library, "decode", broken)
    with pytest.raises(Unauthorized) as caught:
        await acme.verifier().verify(acme.token(), "")
    assert caught.value.reason == "unverifiable"
    assert acme.errors.places == ["jwt"]


async def test_a_claim_that_only_the_library_refuses_is_refused() -> None:
    """An ID token with `at_hash` is none for us; the same happens where the system's clock is not ours."""
    acme = Authority()
    with pytest.raises(Unauthorized) as caught:
        await acme.verifier().verify(acme.token(claims=acme.claims(at_hash="x")), "")
    assert (caught.value.reason, acme.errors.places) == ("unverifiable", [])


def test_tokens_are_recognised_by_their_form() -> None:
    verifier = Authority().verifier()
    assert verifier.recognises("a.b.c")
    assert not verifier.recognises("mlxd_live_000000000000_x_y")


def test_a_key_and_a_grant_do_not_show_secrets() -> None:
    assert "0123456789" not in repr(bind(SECRET, "HS256"))


def test_our_own_tokens_are_plain_ones() -> None:
    token = sign({"sub": "a"}, bind(SECRET, "HS256"))
    assert library.decode(token, SECRET, algorithms=["HS256"]) == {"sub": "a"}
    assert library.get_unverified_header(token) == {"alg": "HS256", "typ": "JWT"}


DEV = issuer_settings(
    name="dev",
    algorithms=("HS256",),
    jwks_file=None,
    secret_file="/nowhere/s",
    tenant_claim="tid",
    tenants={"blue": ""},
    scopes=("inference", "usage", "admin"),
)


def issued(**changes: Any) -> str:
    given: dict[str, Any] = {"subject": "bob", "lifetime": 60, "now": int(time.time()), "token_id": "t9", **changes}
    return issue(DEV, bind(SECRET, "HS256"), **given)


async def test_an_issued_token_is_accepted_with_what_was_asked_for() -> None:
    acme = Authority()
    verifier = TokenVerifier([Issuer(DEV, SecretKey(SECRET))], acme.denials, acme.errors)
    grant = await verifier.verify(issued(tenant="blue", scopes=["admin"]), "")
    assert (grant.principal.id, grant.principal.tenant, grant.identity.token_id) == ("dev:bob", "dev/blue", "t9")
    assert grant.principal.scopes == {Scope.ADMIN}
    assert (await verifier.verify(issued(), "")).principal.scopes == {Scope.INFERENCE, Scope.USAGE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scopes": ["models"]}, "dev may not grant models."),
        ({"plan": "gold"}, "dev has no plan_claim."),
        ({"tenant": "green"}, "The service would refuse this token: tenant."),
        ({"subject": ""}, "The service would refuse this token: claims."),
        ({"lifetime": 10**6}, "The service would refuse this token: lifetime."),
    ],
)
def test_a_token_that_would_be_refused_is_not_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        issued(**changes)
    assert caught.value.message == message


def test_the_library_comes_without_its_decryption() -> None:
    """CVE-2024-33664 is in its JWE, which nothing here needs."""
    program = (
        "import sys, service.auth.key_sets; "
        "sys.exit(sorted(m for m in sys.modules if m in ('jose.jwe', 'ecdsa', 'rsa', 'fastapi')) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def test_verification_costs_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    acme, dev = Authority(), secret_issuer()
    verifier = acme.verifier(dev)
    hs = pack({"alg": "HS256", "typ": "JWT"}, acme.claims(iss="dev"), sign_hmac(SECRET))
    lines = []
    for name, token in (("HS256", hs), ("RS256", acme.token()), ("ES256", acme.es_token())):
        costs = []
        for _ in range(200):
            began = time.perf_counter()
            await verifier.verify(token, "")
            costs.append(time.perf_counter() - began)
        median = sorted(costs)[100] * 1e6
        lines.append(f"{name} {median:.0f} us")
        assert median < 20_000
    with capsys.disabled():
        print(f"\nverification of a token, median of 200: {', '.join(lines)}")
