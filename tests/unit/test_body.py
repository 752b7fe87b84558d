import contextlib
import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service.api.body import INLINE_BYTES, MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, check_media_type, parse
from service.errors import InvalidRequest, UnsupportedMediaType
from tests.fakes_api import DONE, Client, FakeInference, Service

clean_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | clean_text
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(clean_text, inner), max_leaves=20)


@given(documents, st.booleans())
def test_a_clean_document_comes_back_as_it_was_written(document: Any, escaped: bool) -> None:
    assert parse(json.dumps(document, ensure_ascii=escaped).encode()) == document


@given(st.binary())
def test_no_bytes_raise_anything_but_a_refusal(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        parse(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{} {}",
        b"\xff{}",
        '{"a": "b"}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"a": "\xed\xa0\x80"}',
        b"NaN",
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 1}',
        b'{"b": [{"a": 1, "\\u0061": 2}]}',
        b'{"a": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"a": "x\x00"}',
        b'{"a": ["\\ud800"]}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\\uDFFF"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_json_does_not_say_clearly_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(body)
    assert refused.value.code == "invalid_json"


def test_an_escaped_surrogate_pair_is_one_character() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("unit", ["[],", "{},", '{"a":1},'])
def test_containers_are_counted_outside_strings_only(unit: str) -> None:
    def body(count: int) -> bytes:
        return f"[{(unit * count).rstrip(',')}]".encode()

    assert len(parse(body(MAX_CONTAINERS - 1))) == MAX_CONTAINERS - 1
    with pytest.raises(InvalidRequest, match="too many"):
        parse(body(MAX_CONTAINERS))
    text = unit.replace('"', "'") * MAX_CONTAINERS + '\\"[' * 10
    assert parse(json.dumps([text]).encode()) == [text]


def test_values_are_counted_outside_strings_only() -> None:
    assert len(parse(b"[" + b"1," * (MAX_VALUES - 1) + b"1]")) == MAX_VALUES
    with pytest.raises(InvalidRequest, match="too many"):
        parse(b"[" + b"1," * MAX_VALUES + b"1]")
    assert parse(b'"' + b"," * (MAX_VALUES + 1) + b'"') == "," * (MAX_VALUES + 1)


def test_a_backslash_before_u0000_is_text() -> None:
    assert parse(rb'"\\u0000"') == r"\u0000"


def test_nesting_is_counted_exactly() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert math.isclose(len(deepest), 2 * MAX_DEPTH)
    parse(deepest)
    with pytest.raises(InvalidRequest, match="nested"):
        parse(b"[" + deepest + b"]")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON; charset="UTF-8"', "application/json;"],
)
def test_json_in_utf8_is_taken(content_type: str) -> None:
    check_media_type(content_type, None)
    check_media_type(content_type, "identity")


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        (None, None),
        ("", None),
        ("text/plain", None),
        ("application/x-www-form-urlencoded", None),
        ("multipart/form-data; boundary=x", None),
        ("application/json; charset=utf-16", None),
        ("application/problem+json", None),
        ("application/json", "gzip"),
        ("application/json", ""),
    ],
)
def test_other_media_types_are_refused(content_type: str | None, encoding: str | None) -> None:
    with pytest.raises(UnsupportedMediaType):
        check_media_type(content_type, encoding)


@pytest.mark.anyio
async def test_a_large_body_is_parsed_in_a_thread_and_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from service.api import body

    threads: list[bool] = []

    def noting(raw: bytes) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse(raw)

    monkeypatch.setattr(body, "parse", noting)
    client = Client(Service(inference=FakeInference([DONE])))
    small = await client.post("/generate", {"prompt": "x"})
    large = await client.post("/generate", {"prompt": "x" * INLINE_BYTES})
    assert (small.status, large.status, threads) == (200, 200, [True, False])
    assert client.service.inference.asks[-1].prompts == ("x" * INLINE_BYTES,)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_every_route_with_a_body_reads_it_strictly(path: str) -> None:
    client = Client(Service())
    json_type = [("content-type", "application/json")]
    assert (await client.request("POST", path, b"{}", [("content-type", "text/plain")])).status == 415
    assert (await client.request("POST", path, b"{}", [*json_type, ("content-encoding", "gzip")])).status == 415
    for body in (b"", b"{", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[]", b'"x"', b"null"):
        answer = await client.request("POST", path, body, json_type)
        assert answer.status == 400, body
    assert client.service.inference.asks == []


@pytest.mark.parametrize("hostile", [b'\\"', b'"\\', b'"\\"', b'\\\\"', b'"'])
def test_two_megabytes_of_escapes_are_refused_in_less_than_a_second(hostile: bytes) -> None:
    """A pattern that looks for the end of each string again from every quote took 3.5 s for 52 kB."""
    body = b"[" * 20_001 + hostile * (2_000_000 // len(hostile))
    began = time.perf_counter()
    with pytest.raises(InvalidRequest):
        parse(body)
    assert time.perf_counter() - began < 1
