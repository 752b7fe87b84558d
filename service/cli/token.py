"""`mlxd token`: make one for development, find out why one is refused, deny one.

Why a token is refused is answered here, to the operator; the service's answer is the same for every reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.context import with_storage
from service.cli.moments import duration
from service.cli.output import AsJson, print_json, print_table, when

if TYPE_CHECKING:
    from service.auth.denied import DenyList
    from service.settings import IssuerSettings, Settings

MAX_INPUT = 64 * 1024

IssuerName = Annotated[str, typer.Option("--issuer", metavar="NAME", help="An issuer of the configuration.")]

EXPLANATIONS = MappingProxyType(
    {
        "too_large": "the token has more than 4096 characters",
        "malformed": "the token is not three parts of canonical base64url with dots between them",
        "not_json": "header or claims are not a strict JSON object: UTF-8, no key twice, at most 8 levels, no NaN",
        "unknown_issuer": "`iss` is not exactly that of a configured issuer",
        "algorithm": "`alg` is not allowed for this issuer, or is not that of the key",
        "token_type": "`typ` is not one of the issuer's token_types",
        "header_parameter": "the header has one of crit, b64, zip, jku, x5u, x5c, jwk, cty",
        "unknown_key": "`kid` is malformed or names no key of the issuer, or is absent where there are several keys",
        "signature": "the signature is not of that key over this token",
        "claims": "a claim is absent or of a wrong type: iss, sub, aud, exp and iat are needed, times are integers",
        "audience": "`aud` does not contain the issuer's audience",
        "expired": "`exp` has passed, by more than the leeway",
        "not_yet_valid": "`nbf` or `iat` is in the future, by more than the leeway",
        "lifetime": "from `iat` to `exp` is more than the issuer's max_lifetime, or nothing",
        "tenant": "the tenant is not among the issuer's tenants",
        "plan": "the plan is not among the issuer's plans",
        "denied": "the token or its subject is on the deny-list",
        "unverifiable": "the library refused it for a reason of its own; is this machine's clock right?",
    }
)


def commands() -> typer.Typer:
    """The commands below `mlxd token`."""
    about = "JWTs of the configured issuers."
    group = typer.Typer(name="token", help=about, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
    group.command("issue")(token_issue)
    group.command("verify")(token_verify)
    group.command("deny")(token_deny)
    group.command("denied")(token_denied)
    return group


def token_issue(
    context: typer.Context,
    *,
    issuer: IssuerName,
    subject: Annotated[str, typer.Option("--sub", help="Who the token speaks for.")],
    scope: Annotated[list[str] | None, typer.Option(help="What it may do; all but admin when not given.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Value of the issuer's tenant claim.")] = None,
    plan: Annotated[str | None, typer.Option(help="Value of the issuer's plan claim.")] = None,
    lifetime: Annotated[str, typer.Option(metavar="DURATION", help="How long it is valid.")] = "1h",
) -> None:
    """Make a token of an issuer with a shared secret, for development."""
    import secrets
    import time

    from service.auth.jwt import bind
    from service.auth.key_sets import read_secret
    from service.auth.token_issue import issue
    from service.errors import InvalidRequest

    valid_for = int(duration("--lifetime", lifetime))
    with with_storage(context) as settings:
        chosen = _issuer(settings, issuer)
        if not chosen.symmetric:
            raise InvalidRequest(f"{issuer} has no shared secret: only it can make its tokens.")
        token = issue(
            chosen,
            bind(read_secret(chosen), "HS256"),
            subject=subject,
            scopes=scope or (),
            tenant=tenant,
            plan=plan,
            lifetime=valid_for,
            now=int(time.time()),
            token_id=secrets.token_hex(16),
        )
    typer.echo(token)


def token_verify(
    context: typer.Context,
    *,
    issuer: Annotated[str | None, typer.Option(metavar="NAME", help="Believe this issuer only.")] = None,
) -> None:
    """Say step by step whether the token on standard input is accepted, and if not, why."""
    with with_storage(context) as settings:
        names = [each.name for each in settings.auth.issuers] if issuer is None else [_issuer(settings, issuer).name]
        token = sys.stdin.buffer.read(MAX_INPUT).decode("ascii", "replace").strip()
        accepted = asyncio.run(_examine(settings, names, token))
    if not accepted:
        raise typer.Exit(1)


async def _examine(settings: Settings, names: list[str], token: str) -> bool:
    from service.auth.jwt import TokenVerifier
    from service.auth.key_sets import open_issuer
    from service.errors import IssuerUnavailable, Unauthorized

    _show_unverified(token)
    issuers = [open_issuer(each) for each in settings.auth.issuers if each.name in names]
    verifier = TokenVerifier(issuers, await _deny_list(settings), _Silent())
    try:
        grant = await verifier.examine(token, lambda step: typer.echo(f"ok        {step}"))
    except Unauthorized as error:
        typer.echo(f"REFUSED   {error.reason}: {EXPLANATIONS[error.reason]}")
        return False
    except IssuerUnavailable:
        for name, health in verifier.health().items():
            if health.error is not None:
                typer.echo(f"mlxd: the keys of {name} cannot be had: {health.error}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from None
    who = grant.principal
    typer.echo(f"ACCEPTED  {_safe(who.id)}, tenant {_safe(who.tenant)}, plan {who.plan}")
    typer.echo(f"          scopes {' '.join(sorted(who.scopes)) or 'none'}")
    if who.models is not None:
        typer.echo(f"          models {_safe(sorted(who.models))}")
    return True


def _show_unverified(token: str) -> None:
    """What the token says of itself; nothing of it is believed yet, nor trusted not to be an escape sequence."""
    from service.auth.strict_jwt import parse
    from service.errors import Unauthorized

    try:
        said = parse(token)
    except Unauthorized:
        return
    for part, values in (("header", said.header), ("claims", said.claims)):
        for name, value in values.items():
            typer.echo(f"{part}    {_safe(name)} = {_safe(value)}")


def _safe(value: object) -> str:
    return json.dumps(value)


async def _deny_list(settings: Settings) -> DenyList:
    """As in the database; empty, and saying so, where there is none yet."""
    from service.auth.denial_store import DatabaseDenialStore
    from service.auth.denied import DenyList
    from service.storage.database import Database
    from service.storage.failures import Reason, StorageFailure

    try:
        with Database.open(settings.storage, settings.server.state_dir) as database:
            found = DenyList(DatabaseDenialStore(database), stale_for=60.0)
            await found.refresh()
    except StorageFailure as error:
        if error.reason is not Reason.UNREACHABLE:
            raise
        typer.echo(f"mlxd: the deny-list is not looked at: {error.message}", err=True)
        found = DenyList(_Nothing(), stale_for=60.0)
        await found.refresh()
    return found


class _Nothing:
    """The rows of a deny-list that does not exist."""

    async def revision(self) -> int:
        return 0

    async def all_denied(self, now: float) -> tuple[()]:  # noqa: ARG002 - the protocol's
        return ()


class _Silent:
    """A command has no metrics."""

    def internal_error(self, where: str) -> None:
        """The log line says it."""


def token_deny(
    context: typer.Context,
    *,
    issuer: IssuerName,
    token_id: Annotated[str | None, typer.Option("--jti", help="The id of one token.")] = None,
    subject: Annotated[str | None, typer.Option("--sub", help="A subject: all its tokens, also future ones.")] = None,
    lasting: Annotated[
        str | None,
        typer.Option("--for", metavar="DURATION", help="How long; until no token of today is valid when not given."),
    ] = None,
) -> None:
    """Refuse a token or a subject, within a second also in a running service."""
    import time

    from service.auth.claims import Identity, is_text
    from service.auth.denied import deny
    from service.storage.database import Database

    if (token_id is None) == (subject is None):
        raise typer.BadParameter("give one of --jti and --sub")
    if not is_text(value := subject if token_id is None else token_id):
        raise typer.BadParameter("not a text that a token can have")
    with with_storage(context) as settings:
        chosen = _issuer(settings, issuer)
        period = chosen.max_lifetime + 2 * chosen.leeway if lasting is None else duration("--for", lasting)
        if period <= 0:
            raise typer.BadParameter("must be longer than no time", param_hint="--for")
        identity = Identity(chosen.name, subject=subject or "", token_id=token_id)
        now = time.time()
        with Database.open(settings.storage, settings.server.state_dir, migrate=True) as database:
            database.write(
                lambda connection: deny(connection, identity, lasting=period, actor=f"cli:{os.getuid()}", now=now)
            ).result()
    typer.echo(f"denied until {when(now + period)}: {_safe(value)} of {chosen.name}")


def token_denied(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List what is denied at the moment."""
    import time

    from service.storage.database import Database
    from service.storage.denied import all_denied

    with with_storage(context) as settings, Database.open(settings.storage, settings.server.state_dir) as database:
        found = database.read(lambda connection: all_denied(connection, time.time())).result()
    if as_json:
        rows: list[dict[str, Any]] = [
            {"issuer": each.issuer, "kind": each.kind, "value": each.value, "expires_at": each.expires_at}
            for each in found
        ]
        print_json(rows)
    else:
        columns = ("issuer", "kind", "value", "until")
        print_table(columns, [(each.issuer, each.kind, _safe(each.value), when(each.expires_at)) for each in found])


def _issuer(settings: Settings, name: str) -> IssuerSettings:
    from service.errors import InvalidRequest

    for each in settings.auth.issuers:
        if each.name == name:
            return each
    raise InvalidRequest(f"There is no issuer {_safe(name)} in the configuration.")
