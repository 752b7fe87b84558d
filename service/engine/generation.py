"""The vocabulary that crosses between the event loop and the generation thread.

Values are frozen; the one living object is `Generation`, the reader's end of a request: a mailbox that
merges what it was sent, so that a slow reader costs one delta of memory and never makes the engine wait.
Imports neither mlx nor any web framework.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from service.errors import ServiceError
from service.observability.record import CANCELLED, RowRecord


class FinishReason(StrEnum):
    """Why a generation ended normally; the spelling is OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn.

    `temperature` 0 is greedy. `top_p`, `top_k`, `min_p` at 1, 0, 0 are off; `repetition_penalty` is off at
    1 (arXiv:1909.05858); presence and frequency penalties are OpenAI's, over the generated tokens.
    `logit_bias` pairs token ids with an additive bias. `seed` gives the row its own random generator.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One row's work: what to continue, how far, for whom, until when.

    `prompt` is not empty and leaves room for `max_tokens` >= 1 in the context. `deadline` is in seconds of
    the engine's monotonic clock and covers queue, prefill and decode. `principal` decides fairness, with `weight` as
    its share, and `tenant` which prefix-cache entries may be reused. `trim_space` drops a first space of the text.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    trim_space: bool = False
    principal: str = "local"
    weight: float = 1.0
    tenant: str = "local"
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one generation: `cached_tokens` of the prompt came from the prefix cache, and
    `completion_tokens` counts every token sampled, the end-of-sequence token included."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class Meter:
    """How far a row has come. The generation thread writes it, field by field; any thread may read.

    Times are seconds of the engine's clock, None for what has not happened. The prompt counts as a whole from the
    moment its prefill begins, and not at all before; `completion_tokens` counts every token sampled.
    """

    submitted_at: float = 0.0
    expected_at: float | None = None
    """When the first token was expected at submission; None when too little was known."""
    prefill_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """What the row has used so far, of prompt and output together."""
        return self.prompt_tokens + self.completion_tokens

    def usage(self) -> Usage:
        """The counts as they are now."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """What became known since the last delta: text, and at the end a reason with the usage, or an error."""

    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ServiceError | None = None

    @property
    def final(self) -> bool:
        """True when nothing follows."""
        return self.finish_reason is not None or self.error is not None

    @property
    def outcome(self) -> str:
        """How a final delta ended its row: an error's code, `length` or `stop`."""
        if self.error is not None:
            return self.error.code
        assert self.finish_reason is not None, "this delta is not final"
        return self.finish_reason.value

    def merged(self, later: Delta) -> Delta:
        """This delta followed by `later`, as one."""
        return Delta(self.text + later.text, later.finish_reason, later.usage, later.error)


class Generation:
    """The reader's end of one running request. Every method belongs to the event loop's thread.

    The owner must call `close()` exactly when it stops reading; closing an unfinished generation cancels
    it, and the engine gives everything back at the next step boundary. Closing twice is harmless.
    """

    __slots__ = ("_closed", "_mail", "_on_close", "_reader", "last", "meter", "request")

    def __init__(self, request: GenerationRequest, on_close: Callable[[Generation], None]) -> None:
        self.request = request
        self.meter = Meter()
        self.last: Delta | None = None
        self._on_close = on_close
        self._mail: Delta | None = None
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def finished(self) -> bool:
        """True once the final delta has been put into the mailbox, read or not."""
        return self.last is not None

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, delta: Delta) -> None:
        """Take a delta from the engine. After the final one, or after close, it is dropped."""
        if self._closed or self.finished:
            return
        self._mail = delta if self._mail is None else self._mail.merged(delta)
        if delta.final:
            self.last = delta
        self._wake()

    def record(self, now: float) -> RowRecord:
        """What is to be kept of it, when it is closed or has ended."""
        meter = self.meter
        return RowRecord(
            prefill_at=meter.prefill_at,
            first_token_at=meter.first_token_at,
            ended_at=now if meter.ended_at is None else meter.ended_at,
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            completion_tokens=meter.completion_tokens,
            max_tokens=self.request.max_tokens,
            finish_reason=CANCELLED if self.last is None else self.last.outcome,
        )

    def fail(self, error: ServiceError) -> None:
        """End it with `error` for the reader, and cancel it; an unfinished one only."""
        if self._closed or self.finished:
            return
        self.put(Delta(error=error))
        self._on_close(self)

    async def read(self) -> Delta:
        """Wait for and take everything that arrived since the last read, merged into one delta. One reader at a time.

        After the final delta has been read, or after close, raises RuntimeError: there is nothing to wait for.
        """
        if self._mail is None:
            if self.finished or self._closed:
                raise RuntimeError("read after the final delta")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        mail, self._mail = self._mail, None
        if mail is None:  # closed while waiting
            raise RuntimeError("closed while reading")
        return mail

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def close(self) -> None:
        """Stop reading; cancels the generation when it is unfinished."""
        if self._closed:
            return
        self._closed = True
        self._mail = None
        self._wake()
        if not self.finished:
            self._on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
