"""The command `mlxd`. Imports lazily: help is instant, and mlx is not imported before TMPDIR is private.

Exit codes, of every command:

    0    done; for `serve`: asked to stop, and drained; supervised also what another start could not help (69, 78)
    1    the address cannot be listened on; native code kept the interpreter from running; a check found damage or a
         fault; a token is refused; there is no such key; `service`: a plan failed, not ready, or not drained
    2    wrong usage of the command line
    69   the model cannot be had; another engine runs here; the storage, or for `top` and `service` the service, cannot
         be asked; `bench` got no good answer
    70   the engine failed, or the watchdog found it or the event loop stuck
    73   a file of results cannot be written
    77   `service` needs root
    78   the configuration cannot be used
    130  interrupted (SIGINT), where a second signal did not wait for the drain and nobody supervises
    143  as 130, by SIGTERM
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from service.cli import bench, db, doctor, keys, service as service_commands, token, top, usage
from service.cli.context import explained, load_settings, prepare, settings_loader, staying_down


class Format(StrEnum):
    """How `config show` prints."""

    TOML = "toml"
    JSON = "json"


def main() -> None:
    """Run the command line and exit."""
    commands()()


def commands() -> typer.Typer:
    """Build the command tree. A module that is only imported holds no state."""
    group = partial(typer.Typer, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
    app = group(name="mlxd", pretty_exceptions_enable=False, callback=_options)
    app.command("serve")(serve)
    app.command("version")(version)
    app.command("usage")(usage.usage)
    app.command("top")(top.top)
    app.command("doctor")(doctor.doctor)
    model = group(name="model", help="The model that is served.")
    model.command("fetch")(model_fetch)
    config = group(name="config", help="The configuration.")
    config.command("show")(config_show)
    storage = group(name="db", help="The database of keys and audit log.")
    storage.command("backup")(db.db_backup)
    storage.command("check")(db.db_check)
    storage.command("migrate")(db.db_migrate)
    audit = group(name="audit", help="The audit log.")
    audit.command("verify")(db.audit_verify)
    audit.command("list")(db.audit_list)
    app.add_typer(model)
    app.add_typer(config)
    app.add_typer(storage)
    app.add_typer(audit)
    app.add_typer(bench.commands())
    app.add_typer(token.commands())
    app.add_typer(keys.commands())
    app.add_typer(service_commands.commands())
    return app


def _options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML file; in a checkout config/development.toml when not given."),
    ] = None,
) -> None:
    """One warmed mlx-lm engine, served to other people."""
    context.obj = config or _checkout_config(Path.cwd())


def _checkout_config(start: Path) -> Path | None:
    """The development configuration of the checkout around `start`, if it is one of mlxd."""
    for folder in (start, *start.parents):
        candidate = folder / "config" / "development.toml"
        if candidate.is_file() and (folder / "service" / "cli").is_dir():
            return candidate
    return None


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on; stronger than the configuration.")] = None,
    port: Annotated[
        int | None, typer.Option(help="TCP port, 0 for a free one; stronger than the configuration.")
    ] = None,
    supervised: Annotated[
        bool,
        typer.Option("--supervised", help="A supervisor restarts what ends with another code than 0, as launchd does."),
    ] = False,
) -> None:
    """Start the service in the foreground."""
    load = settings_loader(context, {"server.host": host, "server.port": port})
    explain = partial(staying_down, context.obj) if supervised else explained
    with explain():
        settings = load()
    prepare(settings, log_file=True, explain=explain)
    from service.serve import leave_now, run

    with explain():
        code = run(settings, supervised=supervised, load=load)
    leave_now(code)


def model_fetch(context: typer.Context) -> None:
    """Bring the configured model onto this machine (also with model.offline), so that a start needs no network."""
    settings = load_settings(context)
    prepare(settings)
    from service.engine.models import resolve, rich_progress
    from service.errors import ModelUnavailable

    try:
        with rich_progress() if sys.stderr.isatty() else nullcontext() as progress:
            files = resolve(
                settings.model.reference, state_dir=settings.server.state_dir, offline=False, progress=progress
            )
    except ModelUnavailable as error:
        typer.echo(f"mlxd: {error.message}", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from None
    typer.echo(f"{files.name}: {files.path}")


def config_show(
    context: typer.Context,
    output: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TOML,
) -> None:
    """Print the effective settings of all layers."""
    from service.settings import as_toml

    settings = load_settings(context)
    if output is Format.JSON:
        typer.echo(settings.model_dump_json(indent=2))
        return
    values = settings.model_dump(mode="json")
    flat = {f"{section}.{key}": value for section, group in values.items() for key, value in group.items()}
    typer.echo(as_toml(flat), nl=False)


def version() -> None:
    """Print the versions that matter in a report."""
    from importlib.metadata import version as installed

    from service import __version__

    parts = [f"{name} {installed(name)}" for name in ("mlx", "mlx-lm", "uvicorn", "fastapi")]
    typer.echo(f"mlxd {__version__} (Python {sys.version.split()[0]}, {', '.join(parts)})")
