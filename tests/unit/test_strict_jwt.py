"""What one text says, in exactly one reading; and how long the worst of them take."""

import json
import time
from typing import Any

import pytest

from service.auth.strict_jwt import (
    NotStrictJson,
    Reason,
    check_header,
    decode_base64url,
    looks_like_jwt,
    parse,
    strict_json,
)
from service.errors import Unauthorized
from tests.token_authority import b64


@pytest.mark.parametrize("text", ["AA.BB.CC", "a-_.b.c"])
def test_three_parts_of_base64url_look_like_a_token(text: str) -> None:
    assert looks_like_jwt(text)


@pytest.mark.parametrize(
    "text", ["", "mlxd_live_a_b_c", "AA.BB", "AA.BB.", "AA.BB.CC.DD", "AA.B=.CC", "AA.BB.C\n", "é.a.b"]
)
def test_anything_else_does_not(text: str) -> None:
    assert not looks_like_jwt(text)


@pytest.mark.parametrize("text", ["QQ==", "QQ=", "QR", "A", "+w", "/w", "Q Q", "é", "QQ\n"])
def test_base64_in_another_spelling_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - several of them
        decode_base64url(text)


def test_base64url_is_decoded() -> None:
    assert decode_base64url("-_8") == b"\xfb\xff"
    assert decode_base64url("") == b""


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b" ", b"{", b"{}x", b"\xff", b"\xef\xbb\xbf{}", b'"\x00"', b"{'a': 1}", b"[1,]", b"NaN", b"-Infinity"),
        *(b"1e999", b"[-1e999]", b'{"a":1,"a":1}', b'[{"b":{"a":1,"a":2}}]', b'"\\ud800"', b'{"\\udc00":1}'),
        *(b"1" * 21, b"-" + b"1" * 20, b"[" * 9 + b"]" * 9, b'{"a":' * 9 + b"1" + b"}" * 9, b"[" * 100_000),
        *(b'"' + b'\\"' * 50_000, b'"abc\\'),
    ],
    ids=lambda data: str(data[:20]),
)
def test_json_with_two_readings_or_none_is_refused(data: bytes) -> None:
    with pytest.raises(NotStrictJson):
        strict_json(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": "[{[{[{[{[{["}', {"a": "[{[{[{[{[{["}),
        (b'"\\"[[[[[[[[[[\\\\"', '"[[[[[[[[[[\\'),
        (b"[[[[[[[[1]]]]]]]]", [[[[[[[[1]]]]]]]]),
        (b"[[],[],[],[],[],[],[],[],[],[]]", [[]] * 10),
        (b'"\\ud83d\\ude00\\u00e9"', "😀é"),
        (b"9223372036854775807", 2**63 - 1),
        (b"1.5", 1.5),
        (b" null ", None),
    ],
)
def test_other_json_is_what_it_says(data: bytes, value: Any) -> None:
    assert strict_json(data) == value


def test_brackets_and_quotes_without_end_cost_no_more_than_their_length() -> None:
    hostile = [b"[" * 250_000, b'\\"' * 125_000, b'"' * 250_000, b'"' + b"\\" * 250_000, b'[""' * 80_000]
    began = time.perf_counter()
    for data in hostile:
        with pytest.raises(NotStrictJson):
            strict_json(data)
    assert time.perf_counter() - began < 2, "quadratic would be minutes"


def test_a_token_does_not_show_itself() -> None:
    text = ".".join([b64(b'{"alg":"x"}'), b64(b'{"sub":"y"}'), b64(b"signature")])
    token = parse(text)
    assert (token.text, token.header, token.claims) == (text, {"alg": "x"}, {"sub": "y"})
    assert text not in repr(token)


def reason_of(header: dict[str, Any], types: tuple[str, ...] = ("JWT", "at+jwt")) -> str | None:
    try:
        check_header(header, ("RS256",), types)
    except Unauthorized as error:
        return error.reason
    return None


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "application/jwt"])
def test_the_type_of_an_access_token_is_accepted_in_every_spelling(kind: str) -> None:
    assert reason_of({"alg": "RS256", "typ": kind}) is None


@pytest.mark.parametrize("kind", ["logout+jwt", "dpop+jwt", "", None, 1, ["JWT"], "application/", "xapplication/jwt"])
def test_any_other_type_is_refused(kind: object) -> None:
    assert reason_of({"alg": "RS256", "typ": kind}) == Reason.TOKEN_TYPE


def test_a_token_without_a_type_is_accepted_where_the_settings_say_so() -> None:
    assert reason_of({"alg": "RS256"}) == Reason.TOKEN_TYPE
    assert reason_of({"alg": "RS256"}, ("JWT", "")) is None
    assert reason_of({"alg": "RS256", "typ": None}, ("JWT", "")) == Reason.TOKEN_TYPE


def test_the_key_id_is_returned() -> None:
    header = {"alg": "RS256", "typ": "JWT"}
    assert check_header(header, ("RS256",), ("JWT",)) is None
    assert check_header(json.loads('{"alg":"RS256","typ":"JWT","kid":"a.B_c-1"}'), ("RS256",), ("JWT",)) == "a.B_c-1"


def test_a_refusal_has_the_reason_as_a_plain_word() -> None:
    error = Reason.EXPIRED.refusal()
    assert (error.reason, type(error.reason)) == ("expired", str)
