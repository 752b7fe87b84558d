"""`mlxd keys`: make, see, rotate and revoke API keys, beside a running service or without one.

A key is printed once, alone on standard output, so that it can go through a pipe to where it is kept; all else is on
standard error. Exit codes beyond those of every command: 1 where there is no such key, or it cannot be done to this
one; 2 for a value that a key cannot have; 69 where the storage cannot be asked.

How moments and durations are written: `moments.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.context import with_storage
from service.cli.moments import duration, moment
from service.cli.output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from service.auth.api_keys import IssuedKey, Operator
    from service.auth.key_spec import KeySpec
    from service.storage.database import Database
    from service.storage.keys import KeyRecord

Kid = Annotated[str, typer.Argument(metavar="KID", help="The key's public id.")]
Name = Annotated[str, typer.Option(help="What the key is for, or whose it is.")]
Scopes = Annotated[list[str], typer.Option("--scope", help="inference, models, metrics, usage or admin; repeatable.")]
Plan = Annotated[str, typer.Option(help="The plan of its limits.")]
Tenant = Annotated[str | None, typer.Option(help="Whom it shares cache and usage with; nobody when not given.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only this model; repeatable.")]
Networks = Annotated[list[str] | None, typer.Option("--network", metavar="CIDR", help="Only from there; repeatable.")]
NotBefore = Annotated[str | None, typer.Option(metavar="D", help="When it begins to work: a date, or 12h from now.")]
Expires = Annotated[str | None, typer.Option(metavar="D", help="When it stops to work: a date, or 90d from now.")]


def commands() -> typer.Typer:
    """The commands below `mlxd keys`."""
    group = typer.Typer(
        name="keys", help="API keys.", add_completion=False, rich_markup_mode=None, no_args_is_help=True
    )
    group.command("create")(create)
    group.command("list")(list_keys)
    group.command("show")(show)
    group.command("rotate")(rotate)
    group.command("revoke")(revoke)
    group.command("import")(import_keys)
    group.command("rotate-pepper")(rotate_pepper)
    return group


def create(
    context: typer.Context,
    *,
    name: Name,
    scope: Scopes,
    plan: Plan = "default",
    tenant: Tenant = None,
    model: Models = None,
    network: Networks = None,
    not_before: NotBefore = None,
    expires: Expires = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once."""
    period = _period(not_before, expires)
    with _keys(context) as keys:
        spec = _spec(name=name, scopes=scope, plan=plan, tenant=tenant, models=model, networks=network, **period)
        issued = keys.database.write(lambda connection: keys.operator.create(connection, spec)).result()
        _print_issued(issued, as_json=as_json)


def list_keys(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Print every key, oldest first, revoked ones too; never its secret."""
    from service.auth.api_keys import list_all

    with _keys(context) as keys:
        found = [_described(record) for record in keys.database.read(list_all).result()]
    if as_json:
        print_json(found)
        return
    columns = ("kid", "name", "status", "scopes", "plan", "expires_at", "last_used_at")
    print_table(columns, [[_cell(each[column]) for column in columns] for each in found])


def show(context: typer.Context, kid: Kid, *, as_json: AsJson = False) -> None:
    """Print one key with all that is known about it."""
    from service.auth.api_keys import find

    with _keys(context) as keys:
        _print_record(keys.database.read(lambda connection: find(connection, kid)).result(), as_json=as_json)


def rotate(
    context: typer.Context,
    kid: Kid,
    *,
    overlap: Annotated[str, typer.Option(metavar="D", help="How long the old key works beside the new one.")] = "24h",
    expires: Annotated[
        str | None, typer.Option(metavar="D", help="Of the new key; as the old one's if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace a key: the same owner and attributes, a new id and secret. Prints the new key, once."""
    seconds, ends = duration("--overlap", overlap), moment("--expires", expires, time.time())
    with _keys(context) as keys:
        issued = keys.database.write(
            lambda connection: keys.operator.rotate(connection, kid, overlap=seconds, expires_at=ends)
        ).result()
        _print_issued(issued, as_json=as_json)


def revoke(context: typer.Context, kid: Kid, *, as_json: AsJson = False) -> None:
    """Revoke a key for good; running requests end within a second."""
    with _keys(context) as keys:
        record = keys.database.write(lambda connection: keys.operator.revoke(connection, kid)).result()
    if as_json:
        print_json(_described(record))
    else:
        typer.echo(f"mlxd: revoked {kid}", err=True)


def import_keys(
    context: typer.Context,
    *,
    name: Name,
    scope: Scopes,
    plan: Plan = "default",
    tenant: Tenant = None,
    model: Models = None,
    network: Networks = None,
    not_before: NotBefore = None,
    expires: Expires = None,
    as_json: AsJson = False,
) -> None:
    """Take over full keys of mlxd's own format, one a line on standard input; all of them or none."""
    from service.auth.api_keys import MAX_IMPORT
    from service.auth.key_format import LONGEST

    period = _period(not_before, expires)
    given = sys.stdin.buffer.read((MAX_IMPORT + 1) * (LONGEST + 2)).decode("ascii", "replace")
    texts = [line.strip() for line in given.splitlines() if line.strip()]
    with _keys(context) as keys:
        spec = _spec(name=name, scopes=scope, plan=plan, tenant=tenant, models=model, networks=network, **period)
        taken = keys.database.write(lambda connection: keys.operator.take(connection, texts, spec)).result()
    if as_json:
        print_json([_described(record) for record in taken])
    else:
        for record in taken:
            typer.echo(f"mlxd: imported {record.kid}", err=True)


def rotate_pepper(context: typer.Context) -> None:
    """Hash keys that are made from now on with a new secret; the others keep working."""
    with _keys(context) as keys:
        version = keys.operator.peppers.rotate()
        keys.database.write(lambda connection: keys.operator.note_pepper(connection, version)).result()
    typer.echo(f"mlxd: pepper {version} is in use; back the file up", err=True)


@dataclass(frozen=True, slots=True)
class _Keys:
    database: Database
    operator: Operator


@contextmanager
def _keys(context: typer.Context) -> Iterator[_Keys]:
    """The open storage and who asks; every failure is told in one line, and is an exit code."""
    from service.auth.api_keys import Operator
    from service.auth.pepper import Peppers, pepper_file
    from service.errors import InvalidRequest, NotFound
    from service.storage.database import Database

    with with_storage(context) as settings:
        state_dir = settings.server.state_dir
        with Database.open(settings.storage, state_dir, migrate=True) as database:
            peppers = Peppers.open(pepper_file(settings.auth, state_dir))
            operator = Operator(
                actor=f"cli:{os.getuid()}",
                peppers=peppers,
                environment=settings.auth.environment,
                limits=settings.limits,
            )
            try:
                yield _Keys(database, operator)
            except (NotFound, InvalidRequest) as error:
                typer.echo(f"mlxd: {error.message}", err=True)
                raise typer.Exit(1 if error.param in {"kid", "keys"} else 2) from None


def _period(not_before: str | None, expires: str | None) -> dict[str, float | None]:
    now = time.time()
    return {
        "not_before": moment("--not-before", not_before, now),
        "expires_at": moment("--expires", expires, now),
    }


def _spec(**given: Any) -> KeySpec:
    """An option that was not given, or a list of none, means what it means to `KeySpec`."""
    from service.auth.key_spec import KeySpec

    return KeySpec.of(**{name: value for name, value in given.items() if value is not None and value != []})


def _described(record: KeyRecord) -> dict[str, Any]:
    from service.auth.api_keys import describe

    return describe(record, time.time())


def _print_issued(issued: IssuedKey, *, as_json: bool) -> None:
    if as_json:
        print_json(_described(issued.record) | {"key": issued.text})
        return
    typer.echo(f"mlxd: key {issued.record.kid}; it is shown this once and kept nowhere:", err=True)
    typer.echo(issued.text)


def _print_record(record: KeyRecord, *, as_json: bool) -> None:
    described = _described(record)
    if as_json:
        print_json(described)
    else:
        print_table(("field", "value"), [[name, _cell(value)] for name, value in described.items()])


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case list():
            return " ".join(value)
        case dict():
            return " ".join(f"{name}={number}" for name, number in value.items()) or "-"
        case _:
            return str(value)
