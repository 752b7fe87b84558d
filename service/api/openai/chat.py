"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends, Response

from service.api.answer import note_record
from service.api.body import StrictJSONRoute
from service.api.deadline import client_timeout
from service.api.deps import Requires, StateDep
from service.api.openai.messages import plain_messages
from service.api.openai.schemas import ChatCompletion, ChatRequest
from service.api.openai.unsupported import check_chat
from service.api.openai.wire import ChatShape, Head
from service.api.routes import refusals
from service.api.sse import respond
from service.auth.principal import Scope
from service.errors import ContextLengthExceeded
from service.inference import Ask


async def chat_completions(body: ChatRequest, state: StateDep) -> Response:
    """`n` rows that continue one conversation."""
    inference, principal = state["inference"], state["grant"].principal
    limits = state["settings"].engine
    check_chat(body, limits)
    model = inference.resolve_model(body.model, principal)
    rows = body.n or 1
    ask = Ask(
        request_id=state["request_id"],
        endpoint="/v1/chat/completions",
        stream=body.stream is True,
        told=state["standing"].note,
        over=partial(note_record, state["line"]),
        model=body.model,
        messages=plain_messages(body.messages),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default_max_tokens=limits.default_max_tokens,
        timeout=state["timeout"],
        n=rows,
        stop=body.stops(),
        sampling=body.sampling(),
    )
    try:
        generations = await inference.start(ask, principal, state["stack"])
    except ContextLengthExceeded as error:
        error.param = "messages"  # what this route calls the prompt
        raise
    head = Head(
        id=f"chatcmpl-{state['new_id']()}",
        created=int(state["now"]()),
        model=model,
        rows=rows,
        rows_per_prompt=rows,
        include_usage=body.include_usage,
    )
    return respond(generations, ChatShape(head), stream=body.stream is True, state=state)


def build_router() -> APIRouter:
    """The routes of this module."""
    needs = [Depends(Requires(Scope.INFERENCE)), Depends(client_timeout)]
    router = APIRouter(route_class=StrictJSONRoute, dependencies=needs, tags=["openai"])
    router.add_api_route(
        "/v1/chat/completions",
        chat_completions,
        methods=["POST"],
        summary="Answer a conversation",
        responses={**refusals(), 200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
    )
    return router
