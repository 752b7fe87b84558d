"""Whatever a stranger's token may try, and the reason for which it is refused: 85 cases, some in several forms."""

import base64
import json
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from service.auth.jwks import parse_key_set
from service.auth.jwt import Issuer
from service.settings import IssuerSettings
from tests.token_authority import (
    Authority,
    FixedKeys,
    b64,
    ec_jwk,
    ec_key,
    issuer_settings,
    key_set,
    number,
    pack,
    rsa_jwk,
    rsa_key,
    sign_ec,
    sign_hmac,
    sign_pss,
    sign_rsa,
)

Headers = list[tuple[bytes, bytes]]
Attempt = str | Headers | IssuerSettings
RSA_PUBLIC = rsa_key().public_key()
PEM = RSA_PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
DER = RSA_PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SSH_RSA = RSA_PUBLIC.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
SSH_EC = ec_key().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
ACCEPTED = None


class Attacker:
    """What the cases are built with: an authority whose issuer allows more algorithms than its keys are for."""

    def __init__(self, url: str, folder: Path) -> None:
        self.acme = Authority()
        self.acme.settings = issuer_settings(algorithms=("RS256", "RS512", "ES256", "ES384"))
        self.url = url
        self.folder = folder
        self.others: list[Issuer] = []

    def head(self, **changes: object) -> str:
        """A token with this header, rightly signed."""
        return self.acme.token(header=self.acme.header(**changes))

    def body(self, **changes: object) -> str:
        """A token with these claims, rightly signed."""
        return self.acme.token(claims=self.acme.claims(**changes))

    def odd(self, name: str, value: object) -> str:
        """A token with one claim of any JSON value, null too."""
        return self.acme.token(claims={**self.acme.claims(), name: value})

    def raw(self, claims: bytes) -> str:
        return self.acme.token(claims=claims)

    def more(self, text: str) -> bytes:
        """The good claims, with JSON text put in front of them."""
        return b"{" + text.encode() + b", " + json.dumps(self.acme.claims()).encode()[1:]

    def hmac(self, secret: bytes) -> str:
        return self.acme.token(header=self.acme.header(alg="HS256"), sign=sign_hmac(secret))

    def with_keys(self, token: str, *keys: object) -> str:
        self.acme.keys = FixedKeys(parse_key_set(key_set(*keys), self.acme.settings.algorithms))
        return token

    def parts(self) -> list[str]:
        return self.acme.token().split(".")

    def flipped(self, part: int, before: bytes, after: bytes) -> str:
        """A good token with one bit of a segment's content flipped after it was signed."""
        token = self.acme.token(header=self.acme.header(note="a"))
        parts = token.split(".")
        data = base64.urlsafe_b64decode(parts[part] + "==")
        assert before in data
        parts[part] = b64(data.replace(before, after))
        return ".".join(parts)


def broken_signature(attacker: Attacker) -> str:
    header, claims, signature = attacker.parts()
    return f"{header}.{claims}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def non_canonical(attacker: Attacker) -> str:
    """256 bytes of signature leave four unused bits in the last character."""
    token = attacker.acme.token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    place = alphabet.index(token[-1])
    assert place % 4 == 0
    return token[:-1] + alphabet[place + 1]


def plus_alphabet(attacker: Attacker) -> str:
    header, claims, signature = attacker.parts()
    while "-" not in signature:
        attacker.acme.now += 1
        header, claims, signature = attacker.parts()
    return f"{header}.{claims}.{signature.replace('-', '+')}"


def deny(attacker: Attacker) -> str:
    attacker.acme.denials.denied.add(("acme", "t1"))
    return attacker.acme.token()


def foreign(attacker: Attacker, *, iss: str, kid: str) -> str:
    """`other` has the key `r1` too, but not the same one, and `o2`."""
    settings = issuer_settings(name="other", issuer="https://other.test/")
    keys = key_set(rsa_jwk(rsa_key(1), kid="r1"), rsa_jwk(rsa_key(1), kid="o2"))
    attacker.others.append(Issuer(settings, FixedKeys(parse_key_set(keys, settings.algorithms))))
    header, claims = attacker.acme.header(kid=kid), attacker.acme.claims(iss=iss)
    signer = rsa_key(1) if iss == attacker.acme.settings.issuer else rsa_key()
    return pack(header, claims, sign_rsa(signer))


def secret_of(attacker: Attacker, content: bytes) -> IssuerSettings:
    path = attacker.folder / "secret"
    path.write_bytes(content)
    path.chmod(0o600)
    return issuer_settings(name="dev", algorithms=("HS256",), jwks_file=None, secret_file=path)


def bearer(value: str, *more: tuple[bytes, bytes]) -> Headers:
    return [(b"host", b"x"), (b"authorization", value.encode()), *more]


Make = Callable[[Attacker], Attempt]


def forms(make: Callable[[Attacker, Any], Attempt], values: Iterable[object]) -> tuple[Make, ...]:
    """The same attempt with each of `values`."""

    def with_value(value: object) -> Make:
        return lambda attacker: make(attacker, value)

    return tuple(map(with_value, values))


CASES: dict[str, tuple[str | None, tuple[Make, ...]]] = {
    "01-alg-none": ("algorithm", (lambda a: a.head(alg="none"), lambda a: a.head(alg="none")[:-342] + "AA")),
    "02-alg-nOnE": ("algorithm", (lambda a: a.head(alg="nOnE"),)),
    "03-alg-missing": ("algorithm", (lambda a: a.head(alg=None),)),
    "04-alg-list": ("algorithm", (lambda a: a.head(alg=["RS256"]),)),
    "05-alg-dict": ("algorithm", (lambda a: a.head(alg={"RS256": 1}),)),
    "06-alg-lower-case": ("algorithm", (lambda a: a.head(alg="rs256"),)),
    "07-alg-not-in-list": ("algorithm", (lambda a: a.head(alg="RS384"), lambda a: a.head(alg="S2"))),
    "08-hs-with-pem": ("algorithm", (lambda a: a.hmac(PEM),)),
    "09-hs-with-der": ("algorithm", (lambda a: a.hmac(DER),)),
    "10-hs-with-openssh-rsa": ("algorithm", (lambda a: a.hmac(SSH_RSA),)),
    "11-hs-with-openssh-ecdsa": ("algorithm", (lambda a: a.hmac(SSH_EC),)),
    "12-hs-with-jwk-text": ("algorithm", (lambda a: a.hmac(json.dumps(rsa_jwk(rsa_key())).encode()),)),
    "13-rs512-header-on-rs256-key": (
        "algorithm",
        (
            lambda a: a.head(alg="RS512"),
            lambda a: a.acme.token(a.acme.header(alg="RS512"), sign=sign_rsa(rsa_key(), "512")),
        ),
    ),
    "14-es256-token-to-rsa-key": (
        "algorithm",
        (lambda a: a.acme.token(a.acme.header(alg="ES256"), sign=sign_ec(ec_key())),),
    ),
    "15-es384-on-p256": (
        "algorithm",
        (lambda a: a.acme.token(a.acme.header(alg="ES384", kid="e1"), sign=sign_ec(ec_key(), "384")),),
    ),
    "16-ps256": ("algorithm", (lambda a: a.acme.token(a.acme.header(alg="PS256"), sign=sign_pss(rsa_key())),)),
    "17-eddsa": ("algorithm", (lambda a: a.head(alg="EdDSA"),)),
    "18-encryption-as-signature": ("algorithm", (lambda a: a.head(alg="dir"), lambda a: a.head(alg="RSA-OAEP"))),
    "19-kid-absent-with-two-keys": ("unknown_key", (lambda a: a.head(kid=None),)),
    "20-kid-unknown": ("unknown_key", (lambda a: a.head(kid="r2"), lambda a: a.head(kid="R1"))),
    "21-kid-path": ("unknown_key", (lambda a: a.head(kid="../../r1"), lambda a: a.head(kid="/dev/null"))),
    "22-kid-sql": ("unknown_key", (lambda a: a.head(kid="r1' OR '1'='1"), lambda a: a.head(kid="r1;--"))),
    "23-kid-megabyte": ("too_large", (lambda a: a.head(kid="r" * 1_000_000),)),
    "24-kid-no-string": (
        "unknown_key",
        (
            *forms(lambda a, kid: a.acme.token({**a.acme.header(), "kid": kid}), (1, None, ["r1"], {})),
            lambda a: a.head(kid=""),
            lambda a: a.head(kid="r" * 65),
        ),
    ),
    "25-jku": ("header_parameter", (lambda a: a.head(jku=a.url),)),
    "26-x5u": ("header_parameter", (lambda a: a.head(x5u=a.url),)),
    "27-x5c": ("header_parameter", (lambda a: a.head(x5c=["MIIB"]),)),
    "28-embedded-jwk-oct": ("header_parameter", (lambda a: a.head(jwk={"kty": "oct", "k": "AAAA"}),)),
    "29-embedded-jwk-rsa": (
        "header_parameter",
        (lambda a: a.acme.token(a.acme.header(jwk=rsa_jwk(rsa_key(1))), sign=sign_rsa(rsa_key(1))),),
    ),
    "30-crit-unknown": ("header_parameter", (lambda a: a.head(crit=["exp2"], exp2=1), lambda a: a.head(crit=[]))),
    "31-b64-false": ("header_parameter", (lambda a: a.head(b64=False, crit=["b64"]), lambda a: a.head(b64=False))),
    "32-zip": ("header_parameter", (lambda a: a.head(zip="DEF"),)),
    "33-cty-nested": (
        "header_parameter",
        (lambda a: a.head(cty="JWT"), lambda a: a.head(cty="JWT", typ="at+jwt")),
    ),
    "34-jwe": ("malformed", (lambda a: ".".join([*a.parts(), "AAAA", "AAAA"]),)),
    "35-jwe-bomb": ("too_large", (lambda a: ".".join([*a.parts(), "A" * 50_000_000, "AAAA"]),)),
    "36-other-numbers-of-segments": (
        "malformed",
        (
            lambda a: a.parts()[0],
            lambda a: ".".join(a.parts()[:2]),
            lambda a: ".".join([*a.parts(), "AAAA"]),
            lambda a: ".".join(["", *a.parts()]),
        ),
    ),
    "37-empty": ("malformed", (lambda _: "", lambda _: "..", lambda _: ".")),
    "38-whitespace": (
        "malformed",
        (lambda a: a.acme.token() + "\n", lambda a: " " + a.acme.token(), lambda a: a.acme.token().replace(".", ".\t")),
    ),
    "39-junk-in-signature": ("malformed", (lambda a: a.acme.token() + "!", lambda a: a.acme.token() + "\u00e9")),
    "40-padded": ("malformed", (lambda a: a.acme.token() + "==", lambda a: a.acme.token() + "=")),
    "41-non-canonical-last-character": ("malformed", (non_canonical,)),
    "42-plus-and-slash": ("malformed", (plus_alphabet,)),
    "43-empty-signature": ("malformed", (lambda a: ".".join([*a.parts()[:2], ""]),)),
    "44-zero-es-signature": (
        "signature",
        (lambda a: pack(a.acme.header(alg="ES256", kid="e1"), a.acme.claims(), lambda _: bytes(64)),),
    ),
    "45-bit-flip": (
        "signature",
        (
            lambda a: a.flipped(0, b'"a"', b'"c"'),
            lambda a: a.flipped(1, b"alice", b"alicd"),
            broken_signature,
        ),
    ),
    "46-payload-no-object": (
        "not_json",
        forms(lambda a, v: a.raw(v), (b"[]", b'"x"', b"1", b"null", b"true")),
    ),
    "47-not-utf-8": ("not_json", (lambda a: a.raw(a.more('"x": "y"').replace(b"y", b"\xff")),)),
    "48-byte-order-mark": ("not_json", (lambda a: a.raw(b"\xef\xbb\xbf" + json.dumps(a.acme.claims()).encode()),)),
    "49-lone-surrogate": (
        "not_json",
        (lambda a: a.raw(a.more('"x": "\\ud800"')), lambda a: a.raw(a.more('"\\uDFFF": 1'))),
    ),
    "50-nul": ("not_json", (lambda a: a.raw(a.more('"x": "\0"')), lambda a: a.raw(b"\0"))),
    "51-duplicate-exp": ("not_json", (lambda a: a.raw(a.more(f'"exp": {a.acme.now + 60}')),)),
    "52-duplicate-alg": ("not_json", (lambda a: a.acme.token(b'{"alg": "none", "alg": "RS256", "kid": "r1"}'),)),
    "53-deep-header": (
        "not_json",
        forms(
            lambda a, d: a.acme.token(b'{"alg": "RS256", "kid": "r1", "x": ' + b"[" * d + b"]" * d + b"}"), (8, 1000)
        ),
    ),
    "54-deep-payload": (
        "not_json",
        forms(lambda a, d: a.raw(a.more('"x": ' + '{"y":' * d + "1" + "}" * d)), (8, 250)),
    ),
    "55-twenty-megabytes": ("too_large", (lambda a: a.acme.token(claims=a.acme.claims(x="y" * 15_000_000)),)),
    "56-exp-of-many-digits": ("not_json", (lambda a: a.raw(a.more('"x": ' + "9" * 2000)),)),
    "57-exp-string": ("claims", (lambda a: a.body(exp=str(a.acme.now + 60)),)),
    "58-exp-float": ("claims", (lambda a: a.body(exp=a.acme.now + 60.5),)),
    "59-exp-bool": ("claims", (lambda a: a.odd("exp", True),)),
    "60-exp-null": ("claims", forms(lambda a, v: a.odd("exp", v), (None, [], {}))),
    "61-exp-infinite": (
        "not_json",
        forms(lambda a, v: a.raw(a.more(f'"x": {v}')), ("Infinity", "-Infinity", "NaN", "1e400")),
    ),
    "62-expired-by-a-second": (
        "expired",
        (lambda a: a.body(iat=a.acme.now - 300, exp=a.acme.now - a.acme.settings.leeway - 1),),
    ),
    "63-exp-missing": ("claims", (lambda a: a.body(exp=None),)),
    "64-exp-in-ten-years": ("lifetime", (lambda a: a.body(exp=a.acme.now + 315_360_000),)),
    "65-nbf-in-the-future": ("not_yet_valid", (lambda a: a.body(nbf=a.acme.now + 120),)),
    "66-nbf-of-wrong-type": ("claims", forms(lambda a, v: a.odd("nbf", v), ("soon", None, 1.5, False))),
    "67-iat-in-the-future": ("not_yet_valid", (lambda a: a.body(iat=a.acme.now + 120, exp=a.acme.now + 200),)),
    "68-iat-missing": ("claims", (lambda a: a.body(iat=None),)),
    "69-aud-missing": ("claims", (lambda a: a.body(aud=None), lambda a: a.odd("aud", None))),
    "70-aud-wrong": ("audience", (lambda a: a.body(aud="MLXD"), lambda a: a.body(aud="mlx"))),
    "71-aud-list-with-ours": (ACCEPTED, (lambda a: a.body(aud=["x", "mlxd"]),)),
    "72-aud-empty-list": ("audience", (lambda a: a.body(aud=[]),)),
    "73-iss": (
        "unknown_issuer",
        forms(
            lambda a, v: a.odd("iss", v),
            (None, "https://evil.test/", ["https://acme.test/"], {"https://acme.test/": 1}, 1),
        ),
    ),
    "74-iss-nearly": (
        "unknown_issuer",
        forms(lambda a, v: a.body(iss=v), ("https://acme.test", "https://ACME.test/", "https://acme.test//")),
    ),
    "75-sub": (
        "claims",
        forms(lambda a, v: a.odd("sub", v), (None, 1, "", "a\x1b[2J", "a\u202eb", "\u0000", "x" * 257, ["a"])),
    ),
    "76-revoked-jti": ("denied", (deny,)),
    "77-key-of-another-issuer": (
        "signature",
        (
            lambda a: foreign(a, iss="https://acme.test/", kid="r1"),
            lambda a: foreign(a, iss="https://other.test/", kid="r1"),
        ),
    ),
    "78-key-for-encryption": (
        "unknown_key",
        (lambda a: a.with_keys(a.acme.token(), rsa_jwk(rsa_key(), kid="r1") | {"use": "enc"}),),
    ),
    "79-rsa-512": (
        "unknown_key",
        (
            lambda a: a.with_keys(
                a.acme.token(),
                {"kty": "RSA", "kid": "r1", "e": "AQAB", "n": number(secrets.randbits(512) | 1 << 511 | 1)},
            ),
        ),
    ),
    "80-point-off-its-curve": (
        "unknown_key",
        (
            lambda a: a.with_keys(
                a.acme.es_token(),
                ec_jwk(ec_key(), kid="e1") | {"x": b64(bytes(31) + b"\1"), "y": b64(bytes(31) + b"\1")},
            ),
        ),
    ),
    "81-one-bad-key-beside-a-good-one": (
        ACCEPTED,
        (
            lambda a: a.with_keys(
                a.acme.token(),
                None,
                {"kty": "OKP", "crv": "Ed25519", "kid": "o", "x": b64(bytes(32))},
                ec_jwk(ec_key(), kid="bad") | {"y": b64(bytes(32))},
                {"kty": "EC", "n": "AQAB", "kid": "r0"},
                rsa_jwk(rsa_key(), kid="r1"),
            ),
        ),
    ),
    "82-two-authorization-headers": (
        "ambiguous",
        (
            lambda a: bearer(f"Bearer {a.acme.token()}", (b"authorization", b"Bearer x")),
            lambda a: bearer(f"Bearer {a.acme.token()}", (b"x-api-key", a.acme.token().encode())),
        ),
    ),
    "83-bearer-with-more-spaces": (
        "malformed",
        forms(
            lambda a, form: bearer(form.format(a.acme.token())),
            ("Bearer  {}", " Bearer {}", "Bearer {} ", "Bearer\t{}", "Bearer{}", "Basic {}", "{}"),
        ),
    ),
    "84-token-in-the-query": ("missing", (lambda _: [(b"host", b"x")],)),
    "85-secret-too-short": (
        "must hold 32 bytes or more",
        forms(secret_of, (b"", b"\n", b"x" * 31, b"x" * 31 + b"\n")),
    ),
}
