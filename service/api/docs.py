"""`GET /docs` and `GET /openapi.json`: what the service offers, for whoever has a principal.

FastAPI's own routes for these have no dependencies, so they would be open. Swagger's page loads its script and its
style from a CDN (jsdelivr): without internet access it stays empty, and `/openapi.json` is all there is.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse

from service.api.deps import Requires
from service.auth.principal import Scope

SCHEMA_PATH: Final = "/openapi.json"


def build_router(app: FastAPI) -> APIRouter:
    """The routes of this module, which describe `app`."""

    def schema() -> Response:
        """Made once, at the first call; in a thread of the pool, because that takes a while."""
        return JSONResponse(app.openapi())

    async def page() -> Response:
        """Swagger's page."""
        return get_swagger_ui_html(openapi_url=SCHEMA_PATH, title=app.title)

    router = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], include_in_schema=False)
    router.add_api_route(SCHEMA_PATH, schema, methods=["GET", "HEAD"])
    router.add_api_route("/docs", page, methods=["GET", "HEAD"])
    return router
