"""Where identity, limits and engine meet: tokenise, reserve, submit; settle. The one path into the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from service.auth.principal import Principal
from service.engine.backend import ModelInfo
from service.engine.engine import Engine
from service.engine.generation import Generation, GenerationRequest, SamplingParams
from service.engine.tokenizer import SHORT
from service.errors import ContextLengthExceeded, InvalidRequest, NotFound
from service.limits.limiter import Held, Limits
from service.limits.states import TokenState
from service.observability.ids import Ids
from service.observability.record import RequestRecord
from service.settings import PlanSettings, Settings
from service.storage.usage import UsageRow

ENCODER_THREADS = 2
"""Encoding releases the GIL; two threads keep one huge prompt from delaying everybody's short ones. More make it worse:
with eight, on 16 cores, the interpreter was waited for by as many, and first tokens of long prompts came a quarter
later."""

MESSAGE = 32
"""Characters that a message counts as beside its content: the template's part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a route understood of a request, before tokens. Either `prompts` (raw texts or token ids) or `messages`.

    `max_tokens` None means `default_max_tokens`; both are capped by the remaining context. `n` rows are run for each
    prompt, each with its own seed when there is one. `timeout`: seconds that the client is willing to wait for the
    end. `trim_space` drops one space that the text begins with. `endpoint` (the route's path) and `stream` are for the
    record. `told` gets the shared token budget, `over` the record of a request that was queued, when it is over.
    """

    request_id: str
    endpoint: str
    default_max_tokens: int
    told: Callable[[TokenState], None]
    over: Callable[[RequestRecord], None]
    stream: bool = False
    model: str | None = None
    prompts: Sequence[str | Sequence[int]] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    trim_space: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is known of a request once it is queued; its times are the engine's."""

    principal: Principal
    began_at: float
    encoded_at: float

    def record(self, ask: Ask, generations: Sequence[Generation], *, model: str, ended_at: float) -> RequestRecord:
        """The request, now that it is over."""
        return RequestRecord(
            request_id=ask.request_id,
            principal=self.principal.id,
            tenant=self.principal.tenant,
            key_id=self.principal.key_id,
            model=model,
            asked_model=ask.model,
            endpoint=ask.endpoint,
            stream=ask.stream,
            began_at=self.began_at,
            encoded_at=self.encoded_at,
            submitted_at=generations[0].meter.submitted_at,
            ended_at=ended_at,
            rows=tuple(generation.record(ended_at) for generation in generations),
        )


class Inference:
    """Starts generations for a principal. Belongs to the event loop's thread. `observers` get every record."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        limits: Limits,
        *,
        observers: Sequence[Callable[[RequestRecord], None]] = (),
        now: Callable[[], float] = time.time,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.engine = engine
        self._settings = settings
        self._limits = limits
        self._observers = observers
        self._now = now
        self._new_id = new_id or Ids()
        self._encoders = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="encode")

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the loaded model answers to, its own name first. Raises NotReady before it is loaded."""
        info = self.engine.info or self.engine.ready_info()
        return (info.name, *(alias for alias in self._settings.model.aliases if alias != info.name))

    def models_of(self, principal: Principal) -> tuple[str, ...]:
        """The names that `principal` may use. One that may use the model's own name may use its aliases."""
        names = self.model_names
        if principal.models is None or names[0] in principal.models:
            return names
        return tuple(name for name in names if name in principal.models)

    def resolve_model(self, name: str | None, principal: Principal) -> str:
        """The served model's own name for one of its names (None: whichever is served).

        Raises NotFound, also for a model that is served but not to `principal`.
        """
        names = self.models_of(principal)
        if not names or (name is not None and name not in names):
            raise NotFound("The requested model is not served here.", code="model_not_found", param="model")
        return self.model_names[0]

    async def start(self, ask: Ask, principal: Principal, stack: AsyncExitStack) -> list[Generation]:
        """Tokenise, check, reserve and submit; `stack` then owns closing every generation, and settling.

        Every refusal is a ServiceError raised here, before any byte is sent. What is reserved, as what is settled,
        counts the prompt once for each row: each is a prefill of its own.
        """
        began = self.engine.clock()
        info = self.engine.ready_info()
        self.resolve_model(ask.model, principal)
        plan = self._limits.plan_of(principal)
        requests = await self._requests(ask, principal, info, plan)
        encoded = self.engine.clock()
        tokens = sum(len(request.prompt) + request.max_tokens for request in requests)
        held = await self._limits.reserve(principal, plan, tokens, told=ask.told)
        generations: list[Generation] = []
        try:
            generations = self.engine.submit(requests)
        finally:
            if not generations:
                held.settle(0)
        accepted = Accepted(principal, began_at=began, encoded_at=encoded)
        stack.callback(self._settle, ask, accepted, generations, held)
        for generation in generations:
            stack.callback(generation.close)
        return generations

    async def _requests(
        self, ask: Ask, principal: Principal, info: ModelInfo, plan: PlanSettings
    ) -> list[GenerationRequest]:
        """Each row's work. Raises InvalidRequest or ContextLengthExceeded."""
        deadline = self.engine.clock() + self._timeout(ask, plan)
        requests: list[GenerationRequest] = []
        for prompt in await self._prompts(ask, info, plan):
            request = GenerationRequest(
                request_id=ask.request_id,
                prompt=prompt,
                max_tokens=self._max_tokens(ask, info, plan, len(prompt)),
                sampling=_checked(ask.sampling, info),
                stop=ask.stop,
                trim_space=ask.trim_space,
                principal=principal.id,
                weight=plan.weight,
                tenant=principal.tenant,
                deadline=deadline,
            )
            requests += [_nth(request, index) for index in range(ask.n)]
        return requests

    def _settle(self, ask: Ask, accepted: Accepted, generations: Sequence[Generation], held: Held) -> None:
        """The request is over, however it ended, and its generations are closed: charge it, and tell who keeps it."""
        record = accepted.record(ask, generations, model=self.model_names[0], ended_at=self.engine.clock())
        held.settle(record.prompt_tokens + record.completion_tokens)
        self._limits.note(self._usage(record))
        for observe in (ask.over, *self._observers):
            observe(record)

    def _usage(self, record: RequestRecord) -> UsageRow:
        return UsageRow(
            id=self._new_id(),
            at=self._now(),
            request_id=record.request_id,
            principal=record.principal,
            tenant=record.tenant,
            key_id=record.key_id,
            model=record.model,
            endpoint=record.endpoint,
            stream=record.stream,
            rows=len(record.rows),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            queue_seconds=record.queue_seconds,
            time_to_first_token=record.time_to_first_token,
            duration_seconds=record.ended_at - record.submitted_at,
            finish_reason=record.finish_reason,
        )

    async def _prompts(self, ask: Ask, info: ModelInfo, plan: PlanSettings) -> list[tuple[int, ...]]:
        """Each prompt's tokens. Raises InvalidRequest or ContextLengthExceeded."""
        found: list[tuple[int, ...]] = []
        if ask.messages is not None:
            text = "".join(message["content"] for message in ask.messages)
            self._check_length(ask, info, plan, info.tokenizer.at_least(text), at_least=True)
            size = len(text) + MESSAGE * len(ask.messages)
            found.append(await self._encoded(partial(info.tokenizer.encode_chat, ask.messages), size))
        for prompt in ask.prompts:
            if isinstance(prompt, str):
                self._check_length(ask, info, plan, info.tokenizer.at_least(prompt), at_least=True)
                found.append(await self._encoded(partial(info.tokenizer.encode, prompt), len(prompt)))
            elif all(0 <= token < info.vocab_size for token in prompt):
                found.append(tuple(prompt))
            else:
                raise InvalidRequest("The prompt holds a token id outside the vocabulary.", param="prompt")
        for tokens in found:
            if not tokens:
                raise InvalidRequest("The prompt is empty.", param=_prompt_param(ask))
            self._check_length(ask, info, plan, len(tokens), at_least=False)
        return found

    async def _encoded(self, encode: Callable[[], Sequence[int]], size: int) -> tuple[int, ...]:
        """Tokens of a prompt of about `size` characters, made off the loop unless it is short."""
        if size <= SHORT:
            return tuple(encode())
        with self.engine.arrivals.underway():
            return tuple(await asyncio.get_running_loop().run_in_executor(self._encoders, encode))

    def _check_length(self, ask: Ask, info: ModelInfo, plan: PlanSettings, tokens: int, *, at_least: bool) -> None:
        """Raises ContextLengthExceeded, or InvalidRequest for what the plan does not allow."""
        if tokens >= info.context_length:
            raise ContextLengthExceeded(context_length=info.context_length, prompt_tokens=tokens, at_least=at_least)
        self._limits.check_prompt(plan, tokens, param=_prompt_param(ask), at_least=at_least)

    def _max_tokens(self, ask: Ask, info: ModelInfo, plan: PlanSettings, prompt_tokens: int) -> int:
        limit = self._settings.engine.max_output_tokens
        if ask.max_tokens is not None:
            if ask.max_tokens > limit:
                raise InvalidRequest(f"max_tokens may be at most {limit}.", param="max_tokens")
            self._limits.check_output(plan, ask.max_tokens)
        room = info.context_length - prompt_tokens
        return min(ask.max_tokens or ask.default_max_tokens, limit, plan.max_output_tokens, room)

    def _timeout(self, ask: Ask, plan: PlanSettings) -> float:
        """Seconds for the whole request: the shortest of what the service, the plan and the client allow."""
        limit = min(self._settings.engine.request_timeout, plan.request_timeout)
        return limit if ask.timeout is None else min(limit, ask.timeout)

    def close(self) -> None:
        """Let the encoder threads end; running encodes finish first."""
        self._encoders.shutdown(wait=False, cancel_futures=True)


def _prompt_param(ask: Ask) -> str:
    return "prompt" if ask.messages is None else "messages"


def _checked(sampling: SamplingParams, info: ModelInfo) -> SamplingParams:
    if any(not 0 <= token < info.vocab_size for token, _ in sampling.logit_bias):
        raise InvalidRequest("logit_bias names a token id outside the vocabulary.", param="logit_bias")
    return sampling


def _nth(request: GenerationRequest, index: int) -> GenerationRequest:
    """The index-th of n rows: the same work, but not the same dice."""
    seed = request.sampling.seed
    if index == 0 or seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + index))
