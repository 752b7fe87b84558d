"""`/admin/keys`: what `mlxd keys` does, over HTTP, for whoever has the scope `admin`.

Every call is in the audit log with who made it, in the transaction that did what was asked: when the log cannot be
written, nothing is done. A key's text is in the answer that makes it, and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.api.body import StrictJSONRoute
from service.api.deps import CurrentPrincipal, RequestState, Requires, StateDep
from service.api.routes import get_and_head, refusals
from service.auth import api_keys
from service.auth.api_keys import DEFAULT_OVERLAP, IssuedKey, Operator, describe
from service.auth.key_format import is_kid
from service.auth.key_spec import KeySpec
from service.auth.principal import Principal, Scope
from service.errors import InvalidRequest, NotFound
from service.storage import audit
from service.storage.connection import Connection
from service.storage.keys import KeyRecord

PATH: Final = "/admin/keys"

T = TypeVar("T")
Shown = dict[str, Any]


def _seconds(value: object) -> float:
    wrong = ValueError("The value should be a time with its zone, as 2030-01-31T12:00:00Z.")
    try:
        at = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:  # whose message repeats the text
        raise wrong from None
    if at.tzinfo is None:
        raise wrong
    return at.timestamp()


Moment = Annotated[float, BeforeValidator(_seconds), WithJsonSchema({"type": "string", "format": "date-time"})]
"""A time as the answers have it; in here seconds since the epoch."""


class KeyFields(BaseModel):
    """What can be said of a key; `service/auth/key_spec.py` checks the values. Absent: as it is, or the default."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    plan: str | None = None
    tenant: str | None = Field(None, description="null: its own.")
    models: list[str] | None = Field(None, description="Names it may use; null: every model.")
    networks: list[str] | None = Field(None, description="Addresses and CIDRs it may be used from; null: everywhere.")
    limits: dict[str, int] | None = Field(None, description="Numbers of the plan that differ for this key.")
    not_before: Moment | None = None
    expires_at: Moment | None = None


class NewKey(KeyFields):
    name: str
    scopes: list[str]


class ChangedKey(KeyFields):
    name: str | None = None
    scopes: list[str] | None = None


class Rotation(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    overlap: float = Field(DEFAULT_OVERLAP, description="Seconds for which the old key works beside the new one.")
    expires_at: Moment | None = Field(None, description="Of the new key; null: when the old one would have.")


class Desk:
    """Does one call's work in one transaction, on storage's thread."""

    def __init__(self, principal: Principal, state: RequestState) -> None:
        self._access = state["access"]
        self._now = state["now"]
        self._operator = Operator(
            actor=principal.id,
            peppers=state["access"].peppers,
            environment=state["settings"].auth.environment,
            limits=state["limits"].settings,
            now=state["now"],
        )

    async def do(self, what: str, work: Callable[[Operator, Connection], T], **detail: str) -> T:
        """`work` notes what it does; what it refuses is noted here."""
        try:
            return await self._write(lambda connection: work(self._operator, connection))
        except (InvalidRequest, NotFound) as error:
            refusal = {**detail, "call": what, "code": error.code}
            await self._write(lambda connection: self._note(connection, "admin_call_refused", refusal))
            raise

    async def look(self, what: str, work: Callable[[Connection], T], **detail: str) -> T:
        """Something that changes nothing, and is noted all the same."""

        def noted(_: Operator, connection: Connection) -> T:
            self._note(connection, what, detail)
            return work(connection)

        return await self.do(what, noted, **detail)

    def _note(self, connection: Connection, event: str, detail: dict[str, str]) -> None:
        audit.append(connection, event, actor=self._operator.actor, at=self._now(), detail=detail)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._access.storage.write(work))

    def shown(self, record: KeyRecord) -> Shown:
        return describe(record, self._now())

    def issued(self, key: IssuedKey) -> Shown:
        return {**self.shown(key.record), "key": key.text}


async def _desk(principal: CurrentPrincipal, state: StateDep) -> Desk:
    return Desk(principal, state)


async def _kid(kid: str) -> str:
    """What cannot be a key's id is none that we know; it goes no further, and into no log."""
    if not is_kid(kid):
        raise NotFound("There is no such key.", param="kid")
    return kid


DeskDep = Annotated[Desk, Depends(_desk)]
Kid = Annotated[str, Depends(_kid)]


async def create(body: NewKey, desk: DeskDep) -> Shown:
    """Make a key. `key` in the answer is its text, which is shown once."""
    spec = KeySpec.of(**body.model_dump(exclude_unset=True))
    return desk.issued(await desk.do("key_create", lambda operator, connection: operator.create(connection, spec)))


async def list_keys(desk: DeskDep) -> Shown:
    """Every key, revoked and expired ones too, oldest first."""
    return {"keys": [desk.shown(record) for record in await desk.look("keys_listed", api_keys.list_all)]}


async def show(kid: Kid, desk: DeskDep) -> Shown:
    """All there is to tell about one key."""
    return desk.shown(await desk.look("key_shown", lambda connection: api_keys.find(connection, kid), kid=kid))


async def change(kid: Kid, body: ChangedKey, desk: DeskDep) -> Shown:
    """Change single fields; the others stay. A running request that loses what it had ends."""
    fields = body.model_dump(exclude_unset=True)
    record = await desk.do(
        "key_update", lambda operator, connection: operator.update(connection, kid, **fields), kid=kid
    )
    return desk.shown(record)


async def rotate(kid: Kid, body: Rotation, desk: DeskDep) -> Shown:
    """Make a key in the place of this one. `key` in the answer is its text, which is shown once."""
    issued = await desk.do(
        "key_rotate",
        lambda operator, connection: operator.rotate(connection, kid, overlap=body.overlap, expires_at=body.expires_at),
        kid=kid,
    )
    return desk.issued(issued)


async def revoke(kid: Kid, desk: DeskDep) -> Shown:
    """For good, and at once: requests that run on it end. Revoking twice is the same as once."""
    return desk.shown(
        await desk.do("key_revoke", lambda operator, connection: operator.revoke(connection, kid), kid=kid)
    )


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], tags=["admin"])
    one = f"{PATH}/{{kid}}"
    get_and_head(router, PATH, list_keys, summary="List the keys")
    get_and_head(router, one, show, summary="Describe one key")
    router.add_api_route(one, revoke, methods=["DELETE"], summary="Revoke a key", responses=refusals())
    with_body = partial(router.add_api_route, route_class_override=StrictJSONRoute, responses=refusals())
    with_body(PATH, create, methods=["POST"], status_code=201, summary="Make a key")
    with_body(one, change, methods=["PATCH"], summary="Change a key")
    with_body(f"{one}/rotate", rotate, methods=["POST"], status_code=201, summary="Replace a key")
    return router
