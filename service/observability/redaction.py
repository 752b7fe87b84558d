"""What may be in a log line: plain, bounded values, without credentials and without what clients wrote.

`plain` runs where something is logged: what it returns belongs to nobody else, holds no object whose text another
thread would have to ask for, and can always be written as JSON. `redact` is the last step before the bytes leave.
All of it is pure, any thread may call it, and its time is linear in what it gets.
"""

from __future__ import annotations

import builtins
import itertools
import math
import re
from collections.abc import Collection, Mapping, Set as AbstractSet
from typing import Any, Final

MAX_TEXT: Final = 2048
"""Characters of one text in a line, also of a field's name; what is longer is cut and ends with an ellipsis."""
MAX_ITEMS: Final = 64
"""Fields of a line, and items of a list or an object in it."""
MAX_DEPTH: Final = 6
MAX_INTEGER: Final = 2**64

_LONGEST_SECRET: Final = 4096
"""A text is searched that far beyond its cut: half a key must not stay because the other half was cut off."""

WITHHELD: Final = "[withheld]"

_SPEAKING = frozenset(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, OSError | MemoryError | RuntimeError)
)
"""Exceptions of which the words are shown: the system's and mlx's, which tell an operator what is wrong with the
machine. Of any other kind only the type and the place are: `int(prompt)` fails with the prompt in its words."""

_SECRET = re.compile(
    r"(mlxd_[a-z][a-z0-9]{0,11}_[0-9A-Za-z]{12}_)[0-9A-Za-z]{32}_[0-9A-Za-z]{6}"
    r"|((?i:bearer|basic)\s{1,4})(?=\S{0,4096}?[0-9A-Z_=.])[0-9A-Za-z._~+/=-]{8,}+"
    r"|((?:sk-|hf_))[0-9A-Za-z_-]{20,}+"
    r"|(://[^\s/:@\"']{0,64}:)[^\s/@\"']{1,256}(?=@)"
)
"""Our keys, credentials after their scheme, keys of the two services whose clients come here by mistake, and the
password in a URL. What goes before the secret part is kept."""
_TOKEN = re.compile(r"(eyJ[0-9A-Za-z_-]{5,}+)(\.[0-9A-Za-z_.-]++)?+")
"""A JWT, and whatever else begins like one: that is left alone, but it is not searched again from within."""


_HINTS = ("mlxd_", "eyj", "://", "sk-", "hf_", "bearer", "basic")
"""One of these is in whatever the patterns find, in lower case: a line without any costs a twentieth."""


def redact(text: str) -> str:
    """`text` without what looks like a key, a token or a password (LiteLLM #34710: a key in a field named `hash`)."""
    lower = text.lower()
    if not any(hint in lower for hint in _HINTS):
        return text
    return _TOKEN.sub(_shorter_token, _SECRET.sub(_shorter, text))


def _shorter(found: re.Match[str]) -> str:
    return f"{found[found.lastindex or 0]}[redacted]"


def _shorter_token(found: re.Match[str]) -> str:
    return found[0] if found[2] is None else f"{found[1]}.[redacted]"


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """`value` as texts, numbers, lists and objects of no more than the bounds above."""
    kind = type(value)
    if kind is str:
        return value if len(value) <= MAX_TEXT else cut(value)  # most are short, and a call for each is a third of all
    if kind is bool or value is None:
        return value
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping | list | tuple | AbstractSet):
        return _container(value, depth - 1)
    if isinstance(value, BaseException):
        return cut(words(value))
    return cut(str(value) if isinstance(value, str) else repr(value))


def _number(value: float) -> int | float | str:
    """One that JSON has."""
    if isinstance(value, int):
        return int(value) if -MAX_INTEGER < value < MAX_INTEGER else f"an integer of {value.bit_length()} bits"
    return float(value) if math.isfinite(value) else str(value)


def _container(value: Collection[Any], depth: int) -> Any:
    if depth < 0:
        return "[deeper]"
    first = itertools.islice(value, MAX_ITEMS)
    if isinstance(value, Mapping):
        return {cut(str(key)): plain(value[key], depth) for key in first}
    return [plain(item, depth) for item in first]


def words(error: BaseException) -> str:
    """The type of an exception, and what it says where that cannot be a client's text."""
    kind = type(error).__name__
    return f"{kind}: {error}" if kind in _SPEAKING else kind


def cut(text: str, most: int = MAX_TEXT) -> str:
    """`text`, or its beginning; a secret in it is gone before it is cut."""
    return text if len(text) <= most else redact(text[: most + _LONGEST_SECRET])[:most] + "…"


def without_words(stacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """structlog's form of an exception and its causes, in which only some say more than their type and place."""
    for stack in stacks:
        if stack["exc_type"] not in _SPEAKING:
            stack["exc_value"] = WITHHELD
        stack["exc_notes"] = []
        stack["syntax_error"] = None
        for group in stack.get("exceptions", ()):
            without_words(group)
    return stacks
