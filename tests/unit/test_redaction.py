"""What may be in a log line: bounded plain values, no credentials, no client's text out of an exception."""

import json
import math
from collections import UserDict
from enum import StrEnum
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service.auth.key_format import generate
from service.observability.redaction import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_TEXT,
    cut,
    plain,
    redact,
    without_words,
    words,
)

KEY = generate("live", Random(7)).text  # in the names of tests, which must be the same in every process
SECRET = KEY.split("_")[3]
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"x{KEY}x", f"x{KEY[:23]}[redacted]x"),
        (f"token={JWT};", "token=eyJhbGciOiJIUzI1NiJ9.[redacted];"),
        (f"key{JWT}", "keyeyJhbGciOiJIUzI1NiJ9.[redacted]"),
        ("eyJhbGciOiJkaXIifQ..iv.text.tag", "eyJhbGciOiJkaXIifQ.[redacted]"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer [redacted]"),
        ("authorization: basic dXNlcjpwYXNz==", "authorization: basic [redacted]"),
        ("sk-" + "a1" * 12, "sk-[redacted]"),
        ("hf_" + "a1" * 12, "hf_[redacted]"),
        ("redis://user:hunter2@10.0.0.1:6379/0", "redis://user:[redacted]@10.0.0.1:6379/0"),
        ("postgresql+psycopg://:p%40ss@db/x", "postgresql+psycopg://:[redacted]@db/x"),
        (f"eyJaaaaaaa_{KEY}", f"eyJaaaaaaa_{KEY[:23]}[redacted]"),
        (f"{KEY}{JWT}", f"{KEY[:23]}[redacted]eyJhbGciOiJIUzI1NiJ9.[redacted]"),
    ],
)
def test_what_looks_like_a_credential_is_gone_and_what_tells_which_it_was_stays(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    ["", "a basic question", "bearer of news", "http://host:8000/path", "eyJustAName", "task-force", "mlxd_live_", "é"],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


class Colour(StrEnum):
    RED = "red"


class Talkative:
    def __repr__(self) -> str:
        return "x" * 10_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2.5, 2.5),
        (math.inf, "inf"),
        (2**64, "an integer of 65 bits"),
        ("text", "text"),
        (Colour.RED, "red"),
        (b"bytes", "b'bytes'"),
        ((1, "a"), [1, "a"]),
        ({"a": {1: [None]}}, {"a": {"1": [None]}}),
        (UserDict(a=1), {"a": 1}),
        (ValueError("a prompt"), "ValueError"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (Talkative(), "x" * MAX_TEXT + "…"),
    ],
)
def test_values_become_what_json_has(value: Any, shown: Any) -> None:
    found = plain(value)
    assert found == shown
    assert type(found) is type(shown)


def test_values_are_bounded_in_every_direction_also_where_they_hold_themselves() -> None:
    endless: list[Any] = []
    endless.append(endless)
    shown = json.dumps(plain(endless))
    assert shown == "[" * MAX_DEPTH + '"[deeper]"' + "]" * MAX_DEPTH
    assert len(plain(list(range(10_000)))) == MAX_ITEMS
    assert len(plain({str(number): number for number in range(10_000)})) == MAX_ITEMS
    assert len(plain({"k" * 10_000: 1}).popitem()[0]) == MAX_TEXT + 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    )
)
@pytest.mark.no_cover  # many turns of what others cover
def test_whatever_it_is_it_can_be_written_as_strict_json(value: Any) -> None:
    json.loads(json.dumps(plain(value), allow_nan=False))


def test_what_is_handed_over_belongs_to_nobody_else() -> None:
    mine: dict[str, Any] = {"list": [1]}
    taken = plain(mine)
    mine["list"].append(2)
    assert taken == {"list": [1]}


@pytest.mark.parametrize("before", range(MAX_TEXT - len(KEY), MAX_TEXT + 1, 7))
def test_a_secret_at_the_cut_is_not_cut_in_half(before: int) -> None:
    shown = cut("x" * before + KEY + "y" * 10_000)
    assert len(shown) <= MAX_TEXT + 1
    assert not any(SECRET[:length] in shown for length in (8, 16))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyError("a prompt"), "KeyError"),
        (RuntimeError("[metal::malloc] out of memory"), "RuntimeError: [metal::malloc] out of memory"),
        (MemoryError(), "MemoryError: "),
        (type("OfALibrary", (RuntimeError,), {})("a prompt"), "OfALibrary"),
    ],
)
def test_only_the_systems_and_the_devices_errors_say_what_they_say(error: Exception, shown: str) -> None:
    assert words(error) == shown


def test_groups_notes_and_broken_source_lose_their_words_too() -> None:
    inner = {"exc_type": "KeyError", "exc_value": "a prompt", "exc_notes": ["a prompt"], "syntax_error": None}
    broken = {"exc_type": "SyntaxError", "exc_value": "a prompt", "exc_notes": [], "syntax_error": {"line": "a prompt"}}
    kept = {"exc_type": "OSError", "exc_value": "No space", "exc_notes": ["a prompt"], "syntax_error": None}
    group: dict[str, Any] = {"exc_type": "ExceptionGroup", "exc_value": "2", "exc_notes": [], "syntax_error": None}
    shown = without_words([{**group, "exceptions": [[inner], [broken]]}, kept])
    assert "a prompt" not in json.dumps(shown)
    assert shown[1]["exc_value"] == "No space"
