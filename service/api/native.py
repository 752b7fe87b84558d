"""`POST /generate`: the service's own API. A raw prompt goes in, text comes out, whole or token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from service.api.answer import Choice, note_record
from service.api.body import StrictJSONRoute
from service.api.deadline import client_timeout
from service.api.deps import Requires, StateDep
from service.api.openai.schemas import SamplingFields
from service.api.openai.unsupported import check_max_tokens
from service.api.routes import refusals
from service.api.sse import respond
from service.auth.principal import Scope
from service.engine.generation import Delta
from service.inference import Ask

DEFAULT_MAX_TOKENS: Final = 100


class GenerateRequest(SamplingFields):
    """Unknown fields are refused: a misspelt parameter must not be taken for its default."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(description="Text to continue; with `chat`, the user's message.")]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = DEFAULT_MAX_TOKENS
    chat: bool | None = Field(None, description="Apply the model's chat template to the prompt.")
    stream: bool | None = Field(None, description="Answer with Server-Sent Events, token by token.")


class GenerateUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class GenerateAnswer(TypedDict):
    text: str
    finish_reason: Literal["stop", "length"] | None
    usage: GenerateUsage
    model: str
    id: str


class GenerateShape:
    """`{"text": ...}` for each piece, and the whole answer's fields in the last event, with empty text."""

    def __init__(self, *, request_id: str, model: str) -> None:
        self._id = request_id
        self._model = model

    def opening(self) -> list[Mapping[str, Any]]:
        return []

    def chunk(self, index: int, delta: Delta) -> list[Mapping[str, Any]]:  # noqa: ARG002 -- there is one row
        return [{"text": delta.text}] if delta.text else []

    def closing(self, choices: Sequence[Choice]) -> list[Mapping[str, Any]]:
        return [{**self.body(choices), "text": ""}]

    def body(self, choices: Sequence[Choice]) -> GenerateAnswer:
        [choice] = choices
        assert choice.usage is not None, "a row that ended has its usage"
        spent = choice.usage
        return {
            "text": "".join(choice.text),
            "finish_reason": None if choice.finish_reason is None else choice.finish_reason.value,
            "usage": {
                "prompt_tokens": spent.prompt_tokens,
                "completion_tokens": spent.completion_tokens,
                "total_tokens": spent.prompt_tokens + spent.completion_tokens,
                "cached_tokens": spent.cached_tokens,
            },
            "model": self._model,
            "id": self._id,
        }


async def generate(body: GenerateRequest, state: StateDep) -> Response:
    """One row, the first `max_tokens` of which are the answer."""
    inference, principal = state["inference"], state["grant"].principal
    check_max_tokens(body.max_tokens, state["settings"].engine)
    ask = Ask(
        request_id=state["request_id"],
        endpoint="/generate",
        stream=body.stream is True,
        told=state["standing"].note,
        over=partial(note_record, state["line"]),
        prompts=() if body.chat else (body.prompt,),
        messages=[{"role": "user", "content": body.prompt}] if body.chat else None,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        timeout=state["timeout"],
        stop=body.stops(),
        trim_space=True,  # the text is the one of mlx-lm's `generate`
        sampling=body.sampling(),
    )
    generations = await inference.start(ask, principal, state["stack"])
    shape = GenerateShape(request_id=state["request_id"], model=inference.resolve_model(None, principal))
    return respond(generations, shape, stream=body.stream is True, state=state)


def build_router() -> APIRouter:
    """The routes of this module."""
    needs = [Depends(Requires(Scope.INFERENCE)), Depends(client_timeout)]
    router = APIRouter(route_class=StrictJSONRoute, dependencies=needs, tags=["native"])
    router.add_api_route(
        "/generate",
        generate,
        methods=["POST"],
        summary="Continue a prompt",
        responses={**refusals(), 200: {"model": GenerateAnswer, "content": {"text/event-stream": {}}}},
    )
    return router
