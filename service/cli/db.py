"""`mlxd db` and `mlxd audit`: look after the database, beside a running service or without one.

Only `db migrate` changes anything. Exit codes beyond those of every command: 1 where a check found damage, 2 for a
backup that cannot be made like this, 69 where the storage cannot be asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.context import with_storage
from service.cli.output import AsJson, print_json, print_table, when

if TYPE_CHECKING:
    from service.storage.audit import Entry


def db_backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The new file; it must not exist.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Copy the SQLite database into a new file, while the service may go on."""
    from service.storage.backup import back_up

    with with_storage(context) as settings:
        back_up(settings.storage, settings.server.state_dir, file)
    if as_json:
        print_json({"file": str(file), "bytes": file.stat().st_size})
    else:
        typer.echo(f"{file}: {file.stat().st_size} bytes, checked")


def db_check(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Look for damage: the file, its tables, the keys and the audit log's chain."""
    from service.storage.inspection import inspect

    with with_storage(context) as settings:
        findings = inspect(settings.storage, settings.server.state_dir)
    if as_json:
        print_json([{"name": each.name, "ok": each.ok, "detail": each.detail} for each in findings])
    else:
        rows = [(each.name, "ok" if each.ok else "DAMAGED", each.detail) for each in findings]
        print_table(("what", "state", "detail"), rows)
    if not all(each.ok for each in findings):
        raise typer.Exit(1)


def db_migrate(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Bring the database to this version of mlxd, or make it; `serve` does so by itself."""
    from service.storage.database import upgrade

    with with_storage(context) as settings:
        made = upgrade(settings.storage, settings.server.state_dir)
    if as_json:
        print_json({"made": list(made)})
    else:
        typer.echo(f"migrations made: {', '.join(map(str, made))}" if made else "nothing to migrate")


def audit_verify(
    context: typer.Context,
    *,
    head: Annotated[
        str | None, typer.Option(metavar="SEQ:HASH", help="A head printed before: shows what was cut off since.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the audit log's chain. Keep the head that it prints somewhere else."""
    from service.storage import audit
    from service.storage.database import Database

    try:
        expected = None if head is None else audit.Head.parse(head)
    except ValueError:
        raise typer.BadParameter("not a head: SEQ:HASH", param_hint="--head") from None
    with with_storage(context) as settings, Database.open(settings.storage, settings.server.state_dir) as database:
        report = database.read(lambda connection: audit.verify(connection, expected_head=expected)).result()
    if as_json:
        print_json(
            {
                "ok": report.ok,
                "count": report.count,
                "head": None if report.head is None else str(report.head),
                "problem": report.problem,
                "broken_seq": report.broken_seq,
            }
        )
    elif report.ok:
        typer.echo(f"sound: {report.count} entries, head {report.head or 'none'}")
    else:
        typer.echo(f"BROKEN: entry {report.broken_seq} is {report.problem}, after {report.count} sound ones")
    if not report.ok:
        raise typer.Exit(1)


def audit_list(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many entries at most.")] = 50,
    before: Annotated[int | None, typer.Option(min=1, help="Only entries older than this seq.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the newest entries of the audit log, newest first."""
    from service.storage import audit
    from service.storage.database import Database

    with with_storage(context) as settings, Database.open(settings.storage, settings.server.state_dir) as database:
        found = database.read(lambda connection: audit.entries(connection, limit=limit, before=before)).result()
    if as_json:
        print_json([_fields(entry) for entry in found])
    else:
        rows = [(str(each.seq), when(each.at), each.event, each.actor, each.detail) for each in found]
        print_table(("seq", "at", "event", "actor", "detail"), rows)


def _fields(entry: Entry) -> dict[str, Any]:
    try:
        detail = json.loads(entry.detail)
    except ValueError:  # not as we wrote it
        detail = entry.detail
    whole = {"seq": entry.seq, "at": entry.at, "event": entry.event, "actor": entry.actor, "detail": detail}
    return whole | {"previous_hash": entry.previous_hash.hex(), "hash": entry.hash.hex()}
