"""One request's state on the generation thread, and what the worker notes between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.admission import Ticket
from service.engine.backend import Row, Token
from service.engine.generation import FinishReason, Generation, GenerationRequest, Usage
from service.engine.tokenizer import TextStream
from service.errors import ServiceError


@dataclass(slots=True)
class Job:
    """A submitted generation: its text so far and its counts. Fields change on the generation thread only."""

    generation: Generation
    text: TextStream
    sampled: int = 0
    cached: int = 0
    prefilling: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.generation.request

    @property
    def phase(self) -> str:
        """Where the request is: queue, prefill or decode."""
        if self.sampled:
            return "decode"
        return "prefill" if self.prefilling else "queue"

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once its prefill has begun."""
        return Usage(
            prompt_tokens=len(self.request.prompt) if self.prefilling else 0,
            completion_tokens=self.sampled,
            cached_tokens=self.cached,
        )

    def ticket(self, uid: int) -> Ticket:
        """The claim to put before admission."""
        request = self.request
        return Ticket(
            uid=uid,
            principal=request.principal,
            prompt_tokens=len(request.prompt),
            length=len(request.prompt) + request.max_tokens,
            deadline=request.deadline,
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
        )

    def advance(self, token: Token) -> tuple[str, FinishReason | None]:
        """Take one token: (text now certain, how the generation ended by it).

        An end-of-sequence token has no text; a stop string ends a row that the backend still runs.
        """
        self.sampled += 1
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
