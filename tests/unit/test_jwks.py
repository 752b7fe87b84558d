"""Key sets, key by key: what is taken, what is left out and why."""

import json
from typing import Any

import pytest

from service.auth.jwks import MAX_KEYS, KeySetError, parse_key_set
from tests.token_authority import b64, ec_jwk, ec_key, key_set, number, rsa_jwk, rsa_key

ALL = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
RSA = rsa_jwk(rsa_key(), kid="r")
EC = ec_jwk(ec_key(), kid="e")
MODULUS = rsa_key().public_key().public_numbers().n


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA, "RS256"),
        (RSA | {"alg": "RS384"}, "RS384"),
        (RSA | {"key_ops": ["verify"]}, "RS256"),
        ({name: RSA[name] for name in ("kty", "n", "e")}, "RS256"),
        (RSA | {"x5c": ["ignored"], "x5t": "ignored"}, "RS256"),
        (EC, "ES256"),
        (ec_jwk(ec_key("P-384")), "ES384"),
        (ec_jwk(ec_key("P-521"), alg="ES512"), "ES512"),
    ],
)
def test_a_good_key_is_bound_to_one_algorithm(key: dict[str, Any], algorithm: str) -> None:
    parsed = parse_key_set(key_set(key), ALL)
    assert [(each.kid, each.algorithm) for each in parsed.keys] == [(key.get("kid"), algorithm)]
    assert parsed.skipped == {}


def test_an_rsa_key_without_an_algorithm_gets_the_issuers_first_rsa_one() -> None:
    assert parse_key_set(key_set(RSA), ("ES256", "RS512", "RS256")).keys[0].algorithm == "RS512"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "not_an_object"),
        (1, "not_an_object"),
        ("x", "not_an_object"),
        ([], "not_an_object"),
        (RSA | {"d": "AQAB"}, "private"),
        (EC | {"d": "AQAB"}, "private"),
        ({"kty": "oct", "k": "AAAA", "kid": "o"}, "symmetric"),
        (RSA | {"use": "enc"}, "not_for_signatures"),
        (RSA | {"use": None}, "not_for_signatures"),
        (RSA | {"key_ops": ["encrypt"]}, "not_for_signatures"),
        (RSA | {"key_ops": "verify"}, "not_for_signatures"),
        (RSA | {"key_ops": []}, "not_for_signatures"),
        *((RSA | {"kid": kid}, "kid") for kid in (1, "", "a b", "../x", "x" * 65, None)),
        ({"kty": "OKP", "crv": "Ed25519", "x": b64(bytes(32))}, "key_type"),
        ({"kty": ["RSA"]}, "key_type"),
        (RSA | {"alg": "PS256"}, "algorithm"),
        (RSA | {"alg": "HS256"}, "algorithm"),
        (RSA | {"alg": "ES256"}, "algorithm"),
        (RSA | {"alg": ["RS256"]}, "algorithm"),
        (EC | {"alg": "ES384"}, "algorithm"),
        (EC | {"alg": None}, "algorithm"),
        (RSA | {"n": number(2**1023 + 1)}, "rsa_modulus"),
        (RSA | {"n": number(2**2046 + 1)}, "rsa_modulus"),
        (RSA | {"n": number(2**8192 + 1)}, "rsa_modulus"),
        (RSA | {"n": number(MODULUS + 1)}, "rsa_modulus"),
        *((RSA | {"e": number(e)}, "rsa_exponent") for e in (1, 3, 257, 65535, 65538, 2**32 + 1)),
        *((RSA | {"e": e}, "invalid") for e in (65537, None, "AQAB=", "A+AB", "é")),
        (RSA | {"n": RSA["n"] + "="}, "invalid"),
        *((EC | {"crv": crv}, "curve") for crv in ("secp256k1", "P-192", None, ["P-256"])),
        (EC | {"x": b64(bytes(32)), "y": b64(bytes(32))}, "invalid"),
        (EC | {"x": b64(bytes(31) + b"\1")}, "invalid"),
        (EC | {"x": b64(b"\xff" * 32)}, "invalid"),
        (EC | {"x": b64(bytes(33))}, "invalid"),
        (EC | {"crv": "P-384"}, "invalid"),
        ({name: EC[name] for name in ("kty", "crv", "x")}, "invalid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_key_is_left_out_and_counted_and_the_good_one_stays(key: object, reason: str) -> None:
    parsed = parse_key_set(key_set(key, ec_jwk(ec_key(), kid="good")), ALL)
    assert [each.kid for each in parsed.keys] == ["good"]
    assert parsed.skipped == {reason: 1}


def test_a_key_whose_algorithm_the_issuer_does_not_allow_is_left_out() -> None:
    assert parse_key_set(key_set(RSA, EC), ("ES256",)).skipped == {"algorithm": 1}
    assert parse_key_set(key_set(RSA, EC), ("RS256",)).skipped == {"algorithm": 1}


def test_the_first_key_of_an_id_stays() -> None:
    parsed = parse_key_set(key_set(RSA, rsa_jwk(rsa_key(1), kid="r"), EC), ALL)
    assert [each.kid for each in parsed.keys] == ["r", "e"]
    assert parsed.skipped == {"duplicate_kid": 1}
    assert parsed.find("r") is parsed.keys[0]


def test_a_token_without_a_key_id_finds_the_only_key() -> None:
    bare = {name: RSA[name] for name in ("kty", "n", "e")}
    only = parse_key_set(key_set(RSA), ALL)
    assert only.find(None) is only.keys[0]
    assert only.find("x") is None
    assert parse_key_set(key_set(RSA, EC), ALL).find(None) is None
    two = parse_key_set(key_set(bare, bare), ALL)
    assert (len(two.keys), two.find(None)) == (2, None)


def test_a_set_without_keys_is_a_set() -> None:
    parsed = parse_key_set(key_set(), ALL)
    assert (parsed.keys, parsed.find(None), parsed.find("r")) == ((), None, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>", "is not strict JSON"),
        (b"", "is not strict JSON"),
        (b'{"keys": [], "keys": []}', "is not strict JSON"),
        (b"[]", "has no list of keys"),
        (b"{}", "has no list of keys"),
        (b'{"keys": {}}', "has no list of keys"),
        (json.dumps({"keys": [1] * (MAX_KEYS + 1)}).encode(), f"has more than {MAX_KEYS} keys"),
    ],
)
def test_what_is_no_set_is_told(data: bytes, message: str) -> None:
    with pytest.raises(KeySetError, match=message):
        parse_key_set(data, ALL)


def test_a_key_does_not_show_its_material() -> None:
    assert "Key object" not in repr(parse_key_set(key_set(RSA), ALL))
