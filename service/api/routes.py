"""How routes are declared: what every one of them may answer, and HEAD beside GET."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from service.api.openai.schemas import ErrorBody


def refusals() -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document. Naming them also keeps FastAPI from promising a 422 that is never sent."""
    busy = "The service failed or is busy; `retry-after` says when to come back."
    return {
        "4XX": {"model": ErrorBody, "description": "The request was refused; `error.param` names the field."},
        "5XX": {"model": ErrorBody, "description": busy},
    }


def get_and_head(router: APIRouter, path: str, endpoint: Callable[..., Any], *, summary: str) -> None:
    """Answer GET and HEAD at `path`: FastAPI's GET routes refuse HEAD, with which clients and proxies probe."""
    router.add_api_route(path, endpoint, methods=["GET"], summary=summary, responses=refusals())
    router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
