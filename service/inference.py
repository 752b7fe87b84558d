"""Where identity, limits and engine meet: tokenise -> (reserve) -> submit. The one path into the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from service.auth.principal import Principal
from service.engine.backend import ModelInfo
from service.engine.engine import Engine
from service.engine.generation import Generation, GenerationRequest, SamplingParams
from service.errors import ContextLengthExceeded, InvalidRequest, NotFound
from service.settings import Settings

ENCODER_THREADS = 2
"""Encoding releases the GIL; two threads keep one huge prompt from delaying everybody's short ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a route understood of a request, before tokens. Either `prompt` (raw text or token ids) or `messages`.

    `max_tokens` None means `default_max_tokens`; both are capped by the remaining context. `n` rows are run,
    each with its own seed when there is one. `trim_space` drops one space that the text begins with.
    """

    request_id: str
    default_max_tokens: int
    model: str | None = None
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    trim_space: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Inference:
    """Starts generations for a principal. Belongs to the event loop's thread."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self._settings = settings
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
        """Tokenise, check and submit; `stack` then owns closing every generation.

        Every refusal is a ServiceError raised here, before any byte is sent.
        """
        info = self.engine.ready_info()
        self.resolve_model(ask.model, principal)
        deadline = self.engine.clock() + self._settings.engine.request_timeout
        prompt = await self._tokens(ask, info)
        request = GenerationRequest(
            request_id=ask.request_id,
            prompt=prompt,
            max_tokens=self._max_tokens(ask, info, len(prompt)),
            sampling=_checked(ask.sampling, info),
            stop=ask.stop,
            trim_space=ask.trim_space,
            principal=principal.id,
            tenant=principal.tenant,
            deadline=deadline,
        )
        generations = self.engine.submit([_nth(request, index) for index in range(ask.n)])
        for generation in generations:
            stack.callback(generation.close)
        return generations

    async def _tokens(self, ask: Ask, info: ModelInfo) -> tuple[int, ...]:
        """The prompt's tokens, encoded off the loop. Raises InvalidRequest or ContextLengthExceeded."""
        if ask.messages is None and not isinstance(ask.prompt, str):
            tokens = tuple(ask.prompt or ())
            if any(not 0 <= token < info.vocab_size for token in tokens):
                raise InvalidRequest("The prompt holds a token id outside the vocabulary.", param="prompt")
        else:
            text = ask.prompt if isinstance(ask.prompt, str) else "".join(m["content"] for m in ask.messages or ())
            least = info.tokenizer.at_least(text)
            if least >= info.context_length:
                raise ContextLengthExceeded(context_length=info.context_length, prompt_tokens=least, at_least=True)
            loop = asyncio.get_running_loop()
            tokens = tuple(await loop.run_in_executor(self._encoders, _encode, ask, info))
        if not tokens:
            raise InvalidRequest("The prompt is empty.", param="prompt" if ask.messages is None else "messages")
        if len(tokens) >= info.context_length:
            raise ContextLengthExceeded(context_length=info.context_length, prompt_tokens=len(tokens))
        return tokens

    def _max_tokens(self, ask: Ask, info: ModelInfo, prompt_tokens: int) -> int:
        limit = self._settings.engine.max_output_tokens
        if ask.max_tokens is not None and ask.max_tokens > limit:
            raise InvalidRequest(f"max_tokens may be at most {limit}.", param="max_tokens")
        return min(ask.max_tokens or ask.default_max_tokens, limit, info.context_length - prompt_tokens)

    def close(self) -> None:
        """Let the encoder threads end; running encodes finish first."""
        self._encoders.shutdown(wait=False, cancel_futures=True)


def _encode(ask: Ask, info: ModelInfo) -> list[int]:
    if ask.messages is not None:
        return info.tokenizer.encode_chat(ask.messages)
    assert isinstance(ask.prompt, str)
    return info.tokenizer.encode(ask.prompt)


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
