"""The load client against a server of raw bytes on a real socket, whose truth is known to the byte and the second."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from service.bench.answer import Answer
from service.bench.client import Api, BadTarget, Client, Outcome, Target
from service.bench.http import Broken, Connection
from tests.https_server import make_certificates
from tests.scripted_server import (
    CLOSING,
    DONE,
    END,
    OPENING,
    STREAM_HEAD,
    Close,
    Cut,
    Script,
    Scripted,
    Send,
    chunk,
    event,
    plain,
    playing,
    said,
    usage,
)

BODY = {"messages": [], "stream": True}
GOOD: Script = [
    Send(0.25, STREAM_HEAD + chunk(OPENING)),
    Send(0.5, chunk(said("one"))),
    Send(0.75, chunk(said(" two"))),
    Send(1.75, chunk(said(" three") + CLOSING)),
    Send(2.0, chunk(usage(4, prompt=11, cached=5)) + chunk(DONE) + END),
]


async def asked(*scripts: Script, times: int = 1, **more: Any) -> tuple[list[Outcome], Scripted]:
    async with playing(*scripts) as scripted:
        client = Client(Target(url=scripted.url, **more), clock=scripted.clock)
        outcomes = [await client.ask(BODY, keep_text=True) for _ in range(times)]
        client.close()
    return outcomes, scripted


async def one(*scripts: Script, **more: Any) -> Outcome:
    outcomes, _ = await asked(*scripts, **more)
    return outcomes[0]


# What is measured --------------------------------------------------------------------------------------------


async def test_tokens_first_token_gaps_and_end_are_the_scripted_ones() -> None:
    outcome = await one(GOOD)
    assert outcome.error is None
    assert outcome.time_to_first_token == pytest.approx(0.5), "a role without text is no token"
    assert list(outcome.gaps) == pytest.approx([0.25, 1.0])
    assert outcome.end_to_end == pytest.approx(2.0)
    assert (outcome.output_tokens, outcome.told) == (4, True)
    assert (outcome.prompt_tokens, outcome.cached_tokens) == (11, 5)
    assert outcome.time_per_output_token == pytest.approx(1.25 / 3)
    assert outcome.text == "one two three"


async def test_a_slow_first_byte_is_time_to_first_token_from_when_the_request_was_due() -> None:
    async with playing([Send(30.0, STREAM_HEAD + chunk(said("late")) + chunk(DONE) + END)]) as scripted:
        client = Client(Target(url=scripted.url), clock=scripted.clock)
        outcome = await client.ask(BODY, due=scripted.clock.now - 2)
        client.close()
    assert outcome.time_to_first_token == pytest.approx(32.0)
    assert outcome.sent - outcome.due == pytest.approx(2.0)


async def test_without_usage_the_pieces_of_text_are_counted_and_that_is_said() -> None:
    outcome = await one([Send(0, STREAM_HEAD + chunk(said("a") + said("b") + said("") + DONE) + END)])
    assert (outcome.output_tokens, outcome.told, outcome.error) == (2, False, None)


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "x"},
        {"delta": {"content": "x"}},
        {"delta": {"content": None, "reasoning_content": "x"}},
        {"delta": {"reasoning": "x"}},
    ],
)
async def test_text_is_found_where_servers_put_it(choice: dict[str, Any]) -> None:
    outcome = await one([Send(0, STREAM_HEAD + chunk(event({"choices": [{"index": 0, **choice}]}) + DONE) + END)])
    assert (outcome.output_tokens, outcome.text) == (1, "x")


async def test_keep_alive_comments_and_other_fields_are_no_tokens() -> None:
    noise = b": keep-alive\n\nevent: message\nid: 3\nretry: 10\n\n"
    script = [Send(0.1, STREAM_HEAD + chunk(noise)), Send(0.2, chunk(said("a") + noise)), Send(0.9, chunk(DONE) + END)]
    outcome = await one(script)
    assert (outcome.output_tokens, outcome.error) == (1, None)
    assert outcome.time_to_first_token == pytest.approx(0.2)


# Bytes split anywhere ----------------------------------------------------------------------------------------

WIRE = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    + STREAM_HEAD
    + chunk(OPENING + b": comment\n\n")
    + chunk(said("e\u00e9"))
    + b"3;extension=1\r\ndat\r\n"
    + chunk(said("\u20ac")[3:].replace(b"\n", b"\r\n"))
    + chunk(usage(2) + DONE)
    + b"0\r\nTrailer: x\r\n\r\n"
)


class NoSocket:
    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...


async def read(parts: Sequence[bytes]) -> Answer:
    """Part number n arrives at second n."""
    seconds = iter(range(len(parts)))
    connection, answer = Connection(lambda: float(next(seconds))), Answer(keep_text=True)
    connection.connection_made(cast("asyncio.BaseTransport", NoSocket()))
    exchange = asyncio.create_task(connection.exchange(b"", answer))
    await asyncio.sleep(0)
    for part in parts:
        connection.data_received(part)
    await exchange
    return answer


async def test_an_answer_split_at_every_byte_is_the_same_answer() -> None:
    first, second = (WIRE.index(text) + len(text) for text in (b"\\u00e9", b"\\u20ac"))
    for at in range(1, len(WIRE)):
        answer = await read([WIRE[:at], WIRE[at:]])
        assert (answer.text, answer.error, answer.usage["completion_tokens"]) == ("e\u00e9\u20ac", None, 2), at
        if at <= first or at > second + 40:  # both before the split, or both after it
            assert answer.arrivals[0] == answer.arrivals[1] == float(at <= first), at


async def test_an_answer_in_single_bytes_is_timed_by_the_byte_that_completes_each_event() -> None:
    answer = await read([bytes([byte]) for byte in WIRE])
    ends = [WIRE.index(b"\n\n", WIRE.index(b"\\u00e9")) + 1, WIRE.index(b"\r\n\r\n", WIRE.index(b"\\u20ac")) + 3]
    assert list(answer.arrivals) == ends
    assert (answer.text, answer.error) == ("e\u00e9\u20ac", None)


async def test_single_bytes_over_a_real_socket_are_timed_by_the_clock_at_their_arrival() -> None:
    wire = STREAM_HEAD + chunk(said("a")) + chunk(said("b") + usage(2) + DONE) + END
    outcome = await one([Send(number, bytes([byte])) for number, byte in enumerate(wire, 1)])
    first = wire.index(b"\n\n") + 2
    second = wire.index(b"\n\n", first) + 2
    assert outcome.time_to_first_token == pytest.approx(first)
    assert list(outcome.gaps) == pytest.approx([second - first])
    assert outcome.error is None


# What goes wrong ---------------------------------------------------------------------------------------------


async def test_an_error_event_in_mid_stream_is_a_failure_by_its_code() -> None:
    failure = event({"error": {"message": "no", "type": "server_error", "code": "generation_failed"}})
    outcome = await one([Send(0, STREAM_HEAD + chunk(said("a"))), Send(1, chunk(failure) + END)])
    assert outcome.error == "200 generation_failed"


async def test_a_connection_cut_in_mid_stream_is_a_failure_and_the_next_request_gets_a_new_one() -> None:
    cut: Script = [Send(0, STREAM_HEAD + chunk(said("a"))), Cut()]
    outcomes, scripted = await asked(cut, GOOD, times=2)
    assert [outcome.error for outcome in outcomes] == ["cut", None]
    assert scripted.connections == 2


async def test_a_stream_that_is_closed_without_its_last_chunk_is_cut() -> None:
    assert (await one([Send(0, STREAM_HEAD + chunk(said("a") + DONE)), Close()])).error == "cut"


async def test_a_stream_without_terminator_has_no_end() -> None:
    assert (await one([Send(0, STREAM_HEAD + chunk(said("a")) + END)])).error == "200 no end"


async def test_a_429_is_a_failure_by_status_and_code_with_its_retry_after() -> None:
    refusal = json.dumps({"error": {"message": "slow", "code": "rate_limit_requests"}}).encode()
    outcomes, scripted = await asked([Send(0, plain("429 Too Many Requests", refusal, "Retry-After: 7"))], times=2)
    assert [(outcome.error, outcome.retry_after) for outcome in outcomes] == [("429 rate_limit_requests", 7.0)] * 2
    assert scripted.connections == 1, "it is kept after an answer that was read to its end"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (plain("200 OK", b'{"choices": []}'), "200 no stream"),
        (plain("500 Internal Server Error", b"<html>"), "500 no stream"),
        (plain("400 Bad Request", b'{"error": {"type": "invalid_request_error"}}'), "400 invalid_request_error"),
        (plain("400 Bad Request", b'{"error": "flat"}'), "400 no stream"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "malformed"),
        (STREAM_HEAD + b"zz\r\n", "malformed"),
        (STREAM_HEAD + b"2\r\nabc\r\n", "malformed"),
        (STREAM_HEAD + chunk(b"data: {no json}\n\n"), "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "malformed"),
    ],
)
async def test_what_is_no_stream_of_events_is_a_failure_with_a_name(answer: bytes, error: str) -> None:
    assert (await one([Send(0, answer)])).error == error


async def test_what_never_ends_is_not_kept() -> None:
    answer = Answer()
    answer.head(200, {"content-type": "text/event-stream"})
    with pytest.raises(Broken):
        answer.body(b"x" * 5 * 1024 * 1024, 0.0)


async def test_a_refused_connection_is_a_failure() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Client(Target(url=f"http://127.0.0.1:{free.getsockname()[1]}"))
        assert (await client.ask(BODY)).error == "connect"


async def test_an_answer_that_takes_too_long_is_a_timeout_and_its_connection_goes() -> None:
    outcomes, scripted = await asked([], [], times=2, timeout=0.02)
    assert [outcome.error for outcome in outcomes] == ["timeout", "timeout"]
    assert scripted.connections == 2


# Connections -------------------------------------------------------------------------------------------------


async def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_is_replaced() -> None:
    outcomes, scripted = await asked(GOOD, GOOD, [Close()], GOOD, times=3)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert scripted.connections == 2
    assert len(scripted.requests) == 4, "the request that met the end of its connection was sent again"


async def test_a_new_connection_that_is_closed_without_an_answer_is_a_failure() -> None:
    assert (await one([Close()])).error == "cut"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n",
    ],
)
async def test_a_stream_may_end_with_its_connection(head: bytes) -> None:
    script: Script = [Send(0, head + said("a")), Send(1, said("b") + DONE), Close()]
    outcomes, scripted = await asked(script, times=2)
    assert [(outcome.error, outcome.output_tokens) for outcome in outcomes] == [(None, 2)] * 2
    assert scripted.connections == 2


async def test_the_key_is_sent_and_shown_nowhere() -> None:
    _, scripted = await asked(GOOD, key="mlxd_secret", api=Api.COMPLETIONS)
    assert "Authorization: Bearer mlxd_secret\r\n" in scripted.heads[0]
    assert scripted.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "mlxd_secret" not in repr(Target(url="http://x", key="mlxd_secret"))


@pytest.mark.parametrize(("trusted", "error"), [(True, None), (False, "connect")])
async def test_over_tls_only_a_certificate_that_is_trusted_is_sent_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, error: str | None
) -> None:
    authority, chain = make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    async with playing(GOOD, tls=context) as scripted:
        client = Client(Target(url=scripted.url, key="mlxd_secret"), clock=scripted.clock)
        assert (await client.ask(BODY)).error == error
        client.close()
    assert len(scripted.requests) == int(trusted)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_the_url_may_be_given_with_v1_or_without(path: str) -> None:
    async with playing(GOOD) as scripted:
        client = Client(Target(url=scripted.url + path), clock=scripted.clock)
        assert (await client.ask(BODY)).error is None
        client.close()
    assert scripted.heads[0].startswith("POST /v1/chat/completions HTTP/1.1\r\n")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadTarget):
        Client(Target(url=url))
