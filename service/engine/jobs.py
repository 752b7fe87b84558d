"""One request's state on the generation thread, and what the worker notes between two steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from service.engine.admission import Ticket
from service.engine.backend import Backend, Row, Token
from service.engine.generation import FinishReason, Generation, GenerationRequest, Meter, Usage
from service.engine.telemetry import Telemetry
from service.engine.tokenizer import TextStream
from service.errors import ServiceError


@dataclass(slots=True)
class Job:
    """A submitted generation and its text so far. Changes on the generation thread only, except for `cancelled`.

    From the moment it is `cancelled`, which is under `lock`, nothing is counted any more: what its reader then sees
    in the meter is what metrics and ledger have.
    """

    generation: Generation
    text: TextStream
    clock: Callable[[], float]
    lock: AbstractContextManager[Any]
    telemetry: Telemetry
    cancelled: bool = False
    token_at: float = 0.0
    """When the last token was there."""
    spoke: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.generation.request

    @property
    def meter(self) -> Meter:
        return self.generation.meter

    @property
    def phase(self) -> str:
        """Where the request is: queue, prefill or decode."""
        if self.meter.completion_tokens:
            return "decode"
        return "queue" if self.meter.prefill_at is None else "prefill"

    def submitted(self, now: float, expected: float | None) -> None:
        """It waits since `now`; the first token is `expected` after so many seconds, if that is known."""
        self.meter.submitted_at = now
        self.meter.expected_at = None if expected is None else now + expected

    def ticket(self, uid: int) -> Ticket:
        """The claim to put before admission."""
        request = self.request
        return Ticket(
            uid=uid,
            principal=request.principal,
            prompt_tokens=len(request.prompt),
            length=len(request.prompt) + request.max_tokens,
            deadline=request.deadline,
            weight=request.weight,
        )

    def row(self, uid: int) -> Row:
        """The row to insert into the backend."""
        request = self.request
        return Row(
            uid=uid,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            tenant=request.tenant,
            on_prefill=self.begin,
        )

    def begin(self, cached: int) -> None:
        """The prefill begins, after `cached` tokens that are there already."""
        with self.lock:
            if self.cancelled:
                return
            meter = self.meter
            meter.prefill_at = self.clock()
            meter.cached_tokens = cached
            meter.prompt_tokens = len(self.request.prompt)
            self.telemetry.prefill(meter.prompt_tokens, cached)

    def end(self) -> Usage:
        """Nothing more will come; returns what was used."""
        self.meter.ended_at = self.clock()
        return self.meter.usage()

    def cost(self) -> int:
        """What fairness charges for the next token. The prompt was charged at admission, as a whole: with the first
        token comes back what the prefix cache had of it."""
        return 1 if self.meter.completion_tokens else 1 - self.meter.cached_tokens

    def begins_to_speak(self) -> bool:
        """Whether this is its first text: true once. A first token may be half a character and have none."""
        first, self.spoke = not self.spoke, True
        return first

    def advance(self, token: Token, now: float) -> tuple[str, FinishReason | None]:
        """Take one token, which is there since `now`: (text now certain, how the generation ended by it).

        An end-of-sequence token has no text; a stop string ends a row that the backend still runs.
        """
        if self.meter.first_token_at is None:
            self.meter.first_token_at = now
        else:
            self.telemetry.gap(now - self.token_at)
        self.token_at = now
        self.meter.completion_tokens += 1
        ended = token.finish_reason
        text, stopped = ("", False) if ended is FinishReason.STOP else self.text.add(token.token)
        if ended is not None and not stopped:
            rest, stopped = self.text.finish()
            text += rest
        return text, FinishReason.STOP if stopped else ended


@dataclass(slots=True)
class Orders:
    """What the event loop asked for since the last step."""

    cancelled: list[int] = field(default_factory=list)
    abort: ServiceError | None = None
    stop: bool = False

    def __bool__(self) -> bool:
        return self.stop or self.abort is not None or bool(self.cancelled)


@dataclass(slots=True)
class Plan:
    """What the backend is to do before its next step; made under the worker's lock, carried out without it."""

    remove: list[int] = field(default_factory=list)
    insert: list[Row] = field(default_factory=list)
    room: int = 0
    canary: bool = False

    def carry_out(self, backend: Backend) -> None:
        """Who leaves goes, then who comes is inserted, with room for them."""
        backend.remove(self.remove)
        if self.insert:
            backend.make_room(self.room)
        for row in self.insert:
            backend.insert(row)
