"""What one answer of an OpenAI-compatible server says, as it arrives: its events, when there was text, what it cost."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from typing import Any

from service.bench.http import Broken

MAX_REFUSAL = 64 * 1024
"""Bytes of an answer that is no stream that are kept."""

MAX_EVENT = 4 * 1024 * 1024
"""Bytes of one event. What never ends is not read for ever."""

STREAM = "text/event-stream"
TERMINATOR = b"[DONE]"

_ONE_EVENT = re.compile(rb"data: [^\r\n]*\n\n")


class Events:
    """Takes the data of Server-Sent Events from pieces that may be split anywhere; lines end with LF or CRLF."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that is whole now. Comments, names and ids are passed over. Raises Broken."""
        if not self._line and not self._data and _ONE_EVENT.fullmatch(piece):
            return [piece[6:-2]]  # as nearly all are
        *lines, self._line = (self._line + piece).split(b"\n")
        if len(self._line) > MAX_EVENT:
            raise Broken("malformed", "an event has no end")
        found = []
        for ended in lines:
            line = ended.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data.clear()
        return found


class Answer:
    """Reads one answer. `keep_text`: what it says is wanted, for the next turn of a conversation."""

    def __init__(self, *, keep_text: bool = False) -> None:
        self._events: Events | None = None
        self._refusal = b""
        self._keep_text = keep_text
        self._text: list[str] = []
        self.status = 0
        self.retry_after: float | None = None
        self.arrivals = array("d")
        """When each piece of text arrived."""
        self.usage: Mapping[str, Any] = {}
        self.terminated = False
        self.failure: str | None = None
        """The code of an error event."""

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def error(self) -> str | None:
        """Why this is no good answer, in few words: `429 rate_limit_requests`, `200 generation_failed`."""
        if self.failure is not None:
            return f"{self.status} {self.failure}"
        if self._events is None:
            return f"{self.status} {_code(self._refusal) or 'no stream'}"
        return None if self.terminated else f"{self.status} no end"

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """As `Receiver` has it."""
        self.status = status
        if status == 200 and headers.get("content-type", "").startswith(STREAM):  # noqa: PLR2004
            self._events = Events()
        self.retry_after = _seconds(headers.get("retry-after"))

    def body(self, piece: bytes, at: float) -> None:
        """As `Receiver` has it."""
        if self._events is None:
            self._refusal = (self._refusal + piece)[:MAX_REFUSAL]
            return
        for data in self._events.feed(piece):
            self._event(data, at)

    def _event(self, data: bytes, at: float) -> None:
        if data == TERMINATOR:
            self.terminated = True
            return
        try:
            value = json.loads(data.decode())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Broken("malformed", "an event is no JSON object")
        if value.get("error"):
            self.failure = _code(data) or "error"
        if value.get("usage"):
            self.usage = value["usage"]
        for choice in value.get("choices") or ():
            if text := _text(choice):
                self.arrivals.append(at)
                if self._keep_text:
                    self._text.append(text)


def _text(choice: Mapping[str, Any]) -> str:
    """What a choice of a chunk adds, reasoning included."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _code(body: bytes) -> str | None:
    """The code of an error in a JSON body, or its type."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(error, dict):
        return None
    code = error.get("code") or error.get("type")
    return str(code)[:64] if code else None


def _seconds(text: str | None) -> float | None:
    """`Retry-After` in seconds; as a date it is not understood."""
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
