"""`POST /v1/completions`: the legacy route, which editors still use for completion as one types."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Depends, Response

from service.api.answer import note_record
from service.api.body import StrictJSONRoute
from service.api.deadline import client_timeout
from service.api.deps import Requires, StateDep
from service.api.openai.schemas import Completion, CompletionRequest
from service.api.openai.unsupported import check_completion
from service.api.openai.wire import Head, TextShape
from service.api.routes import refusals
from service.api.sse import respond
from service.auth.principal import Scope
from service.errors import InvalidRequest
from service.inference import Ask


async def completions(body: CompletionRequest, state: StateDep) -> Response:
    """`n` rows for each prompt; choice `i` continues prompt `i // n`."""
    inference, principal = state["inference"], state["grant"].principal
    limits = state["settings"].engine
    check_completion(body, limits)
    model = inference.resolve_model(body.model, principal)
    prompts = _prompts(body)
    rows = body.n or 1
    if len(prompts) * rows > limits.max_choices:
        raise InvalidRequest(
            f"Prompts times n may be at most {limits.max_choices} here.", param="prompt", code="invalid_value"
        )
    ask = Ask(
        request_id=state["request_id"],
        endpoint="/v1/completions",
        stream=body.stream is True,
        told=state["standing"].note,
        over=partial(note_record, state["line"]),
        model=body.model,
        prompts=prompts,
        max_tokens=body.max_tokens,
        default_max_tokens=limits.default_max_tokens,
        timeout=state["timeout"],
        n=rows,
        stop=body.stops(),
        sampling=body.sampling(),
    )
    generations = await inference.start(ask, principal, state["stack"])
    head = Head(
        id=f"cmpl-{state['new_id']()}",
        created=int(state["now"]()),
        model=model,
        rows=len(generations),
        rows_per_prompt=rows,
        include_usage=body.include_usage,
    )
    return respond(generations, TextShape(head), stream=body.stream is True, state=state)


def _prompts(body: CompletionRequest) -> Sequence[str | Sequence[int]]:
    """The prompts of a request, each a text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def build_router() -> APIRouter:
    """The routes of this module."""
    needs = [Depends(Requires(Scope.INFERENCE)), Depends(client_timeout)]
    router = APIRouter(route_class=StrictJSONRoute, dependencies=needs, tags=["openai"])
    router.add_api_route(
        "/v1/completions",
        completions,
        methods=["POST"],
        summary="Continue one or several prompts",
        responses={**refusals(), 200: {"model": Completion, "content": {"text/event-stream": {}}}},
    )
    return router
