"""`GET /v1/models` and `GET /v1/models/{id}`: the one model, under each of its names."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from service.api.deps import CurrentPrincipal, RequestState, Requires, StateDep
from service.api.openai.schemas import Model, ModelList
from service.api.routes import get_and_head
from service.auth.principal import Scope


def _model(name: str, state: RequestState) -> Model:
    info = state["engine"].info
    return {
        "id": name,
        "object": "model",
        "created": state["started"],
        "owned_by": "mlxd",
        "max_model_len": None if info is None else info.context_length,
    }


async def list_models(principal: CurrentPrincipal, state: StateDep) -> ModelList:
    """One entry for the model's own name and for each alias, as far as the principal may use them."""
    return {"object": "list", "data": [_model(name, state) for name in state["inference"].models_of(principal)]}


async def retrieve_model(model_id: str, principal: CurrentPrincipal, state: StateDep) -> Model:
    """The bare object; 404 for any other name."""
    state["inference"].resolve_model(model_id, principal)  # raises NotFound
    return _model(model_id, state)


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.MODELS))], tags=["openai"])
    get_and_head(router, "/v1/models", list_models, summary="List the served model's names")
    # Ids contain slashes, written plainly or as %2F: a path parameter takes both.
    get_and_head(router, "/v1/models/{model_id:path}", retrieve_model, summary="Describe one model")
    return router
