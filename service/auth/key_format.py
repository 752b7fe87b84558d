"""The text of an API key: `mlxd_<env>_<kid>_<secret>_<checksum>`. Pure; any thread.

The shape is GitHub's (a prefix that scanners find, underscores that a double click spans, a checksum that refuses
typos without a look-up), with a public id added so that a key is found by an index and not by its secret.

    env       1 to 12 of a-z 0-9, a letter first   tells keys of two installations apart
    kid       12 base62 characters, public         12 x log2(62) = 71 bits: drawn at random, never meets another
    secret    32 base62 characters                 32 x log2(62) = 190 bits, more than the 160 that make a slow
                                                   hash pointless
    checksum  6 base62 characters, zero-padded     CRC32 of everything before its underscore; 62^6 > 2^32

CRC32 refuses every change within 32 consecutive bits, so every wrong character and every swap of two neighbours
before the checksum, and each such change of the checksum itself. Anything else passes once in 2^32. It is no
protection against forgery, nor meant to be: that is the secret's part.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX = "mlxd_"
KID_LENGTH = 12
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6

SCANNER_REGEX = (
    rf"mlxd_[a-z][a-z0-9]{{0,11}}_[0-9A-Za-z]{{{KID_LENGTH}}}"
    rf"_[0-9A-Za-z]{{{SECRET_LENGTH}}}_[0-9A-Za-z]{{{CHECKSUM_LENGTH}}}"
)
"""For secret scanners (docs/keys.md). Without anchors and look-arounds: some engines have neither."""

_KEY = re.compile(SCANNER_REGEX, re.ASCII)
_KID = re.compile(rf"[0-9A-Za-z]{{{KID_LENGTH}}}", re.ASCII)
_SHORTEST = 59
LONGEST = 70
"""Characters of a key whose `env` has 1 and 12."""


class MalformedKey(ValueError):
    """The text is not a key, or a key with a typo. The message never holds the text."""


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A key whose form and checksum are right; whether it is anybody's is another question."""

    env: str
    kid: str
    text: str = field(repr=False)


class Random(Protocol):
    """What is used of the module `secrets`."""

    def choice(self, seq: Sequence[str], /) -> str: ...


def parse(text: str) -> ParsedKey:
    """Take a key apart. Raises MalformedKey; costs the same little for a megabyte as for a character."""
    if not _SHORTEST <= len(text) <= LONGEST:
        raise MalformedKey("not the length of a key")
    if _KEY.fullmatch(text) is None:
        raise MalformedKey("not the form of a key")
    body, _, check = text.rpartition("_")
    if check != checksum(body):
        raise MalformedKey("the checksum is wrong")
    _, env, kid, _ = body.split("_")
    return ParsedKey(env, kid, text)


def generate(env: str, random: Random = secrets) -> ParsedKey:
    """A new key. Raises MalformedKey when `env` is not of its form."""
    kid, secret = ("".join(random.choice(ALPHABET) for _ in range(length)) for length in (KID_LENGTH, SECRET_LENGTH))
    body = f"{PREFIX}{env}_{kid}_{secret}"
    return parse(f"{body}_{checksum(body)}")


def checksum(body: str) -> str:
    """CRC32 (IEEE 802.3, as zlib's) of ASCII text as six base62 digits."""
    number = zlib.crc32(body.encode("ascii"))
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def is_kid(text: str) -> bool:
    """Whether the text could be a key's public id."""
    return _KID.fullmatch(text) is not None
