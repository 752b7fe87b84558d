"""Tokens mutated at random, and rightly signed ones with random contents: refused or accepted, and nothing else."""

import json
import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, strategies as st

from service.auth.jwt import Issuer, TokenVerifier
from service.auth.strict_jwt import NotStrictJson, strict_json
from service.errors import Unauthorized
from tests.token_authority import SECRET, Authority, pack, secret_issuer, sign_hmac

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
OTHERS = "=+/.,!~\0\n\x7f \u00e9\u2028\ud800"


def mutated(text: str, draw: random.Random) -> str:
    """One to three edits: of characters, of ranges, of whole segments."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        start, end = sorted(draw.choices(range(len(text) + 1), k=2))
        new = draw.choice(ALPHABET if draw.random() < 0.8 else OTHERS)
        segments = text.split(".")
        text = draw.choice(
            (
                lambda text=text, start=start, new=new: text[:start] + new + text[start + 1 :],
                lambda text=text, start=start, new=new: text[:start] + new + text[start:],
                lambda text=text, start=start: text[:start] + text[start + 1 :],
                lambda text=text, start=start, end=end: text[:start] + text[start:end].swapcase() + text[end:],
                lambda text=text, start=start, end=end: text[:start] + text[start:end][::-1] + text[end:],
                lambda text=text, start=start: text[:start],
                lambda segments=segments: ".".join(draw.sample(segments, len(segments))),
            )
        )()
    return text


async def attempt(verifier: TokenVerifier, text: str) -> bool:
    """Whether a text is accepted. Anything but a refusal passes through and fails the test."""
    try:
        await verifier.verify(text, "")
    except Unauthorized:
        return False
    return True


async def test_no_mutation_of_a_good_token_is_accepted(count: Callable[[str, int, int], int]) -> None:
    draw = random.Random(20)
    acme, dev = Authority(), secret_issuer()
    verifier = acme.verifier(dev)
    claims = acme.claims(iss="dev")
    good = [acme.token(), acme.es_token(), pack({"alg": "HS256", "typ": "JWT"}, claims, sign_hmac(SECRET))]
    assert [await attempt(verifier, text) for text in good] == [True] * 3
    for number in range(count("mutated tokens", 2_000, 100_000)):
        text = mutated(good[number % 3], draw)
        assert await attempt(verifier, text) is (text in good), repr(text)
    assert acme.errors.places == [], "the library never saw anything that it did not expect"


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
CLAIMS = ["iss", "aud", "sub", "iat", "exp", "nbf", "jti", "scope", "tid", "plan", "models", "at_hash"]
HEADER = ["alg", "typ", "kid", "crit", "b64", "zip", "cty", "jwk"]


def verifier_of_secret(acme: Authority) -> TokenVerifier:
    options: dict[str, Any] = {
        "tenant_claim": "tid",
        "tenants": {"*": ""},
        "plan_claim": "plan",
        "plans": ("gold",),
        "models_claim": "models",
    }
    issuer: Issuer = secret_issuer(**options)
    return TokenVerifier([issuer], acme.denials, acme.errors, now=lambda: acme.now)


@given(st.dictionaries(st.sampled_from(HEADER), JSON, max_size=2), st.dictionaries(st.sampled_from(CLAIMS), JSON))
async def test_rightly_signed_json_of_any_shape_is_refused_or_accepted(
    header: dict[str, Any], claims: dict[str, Any]
) -> None:
    acme = Authority()
    good = acme.claims(iss="dev", scope="inference")
    token = pack({"alg": "HS256", "typ": "JWT", **header}, good | claims, sign_hmac(SECRET))
    if await attempt(verifier_of_secret(acme), token):
        assert all(isinstance((good | claims)[name], str) for name in ("iss", "sub"))
        assert all(type((good | claims)[name]) is int for name in ("iat", "exp"))


@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]{1,20}\.[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{0,20}", fullmatch=True))
async def test_no_text_is_anything_but_refused(text: str) -> None:
    verifier = Authority().verifier()
    verifier.recognises(text)
    assert not await attempt(verifier, text)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_strict_json_agrees_with_json_where_it_accepts(data: bytes) -> None:
    try:
        value = strict_json(data)
    except NotStrictJson:
        return
    assert value == json.loads(data)
