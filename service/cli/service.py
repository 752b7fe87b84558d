"""`mlxd service`: install the service under launchd, and look after it there, or anywhere where it runs.

Every command that changes something prints its plan first, undoes what it did when a step fails, and with `--dry-run`
only prints. Exit codes beyond those of every command: 1 where a plan failed or the service is not ready, 77 where root
is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import drain
from service.cli.context import load_settings
from service.cli.installation import agent_layout, daemon_layout, gather, layout_of, model_of, parts_of, settings_of
from service.cli.output import AsJson, print_json, print_table, when

if TYPE_CHECKING:
    from service.launchd.environment import Model
    from service.launchd.install import Parts
    from service.launchd.layout import Layout
    from service.launchd.plan import Plan
    from service.settings import Settings

NAME = "mlxd"

Agent = Annotated[bool, typer.Option("--agent", help="Of the user who is logged in, for development; else a daemon.")]
Name = Annotated[str, typer.Option(metavar="LABEL", help="launchd's label, and the stem of every path.")]
Root = Annotated[Path, typer.Option(metavar="DIR", help="A prefix for a daemon's paths; launchd is then not asked.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, and change nothing.")]
Wait = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long it may take to become ready.")]
ModelFolder = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="Folder of the model; as configured when not given.")
]


def commands() -> typer.Typer:
    """The commands below `mlxd service`."""
    about = "The installed service, or the running one."
    group = typer.Typer(name="service", help=about, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
    for name, command in (
        ("install", install),
        ("upgrade", upgrade),
        ("uninstall", uninstall),
        ("restart", restart),
        ("status", status),
        ("logs", logs),
        ("render", render),
        ("drain", drain.drain),
        ("undrain", drain.undrain),
    ):
        group.command(name)(command)
    return group


def install(
    context: typer.Context,
    *,
    agent: Agent = False,
    name: Name = NAME,
    root: Root = Path("/"),
    model: ModelFolder = None,
    wait: Wait = 900,
    dry_run: DryRun = False,
) -> None:
    """Install, start and wait until it is ready; over an installation that is there, bring it up to date."""
    settings = load_settings(context)
    if agent:
        _install_agent(context, settings, name, wait, dry_run=dry_run)
        return
    layout = daemon_layout(name, root)
    parts = parts_of(layout, settings, wait)
    _install(parts, model_of(settings, model), dry_run=dry_run)


def upgrade(
    context: typer.Context,
    *,
    name: Name = NAME,
    root: Root = Path("/"),
    wait: Wait = 900,
    dry_run: DryRun = False,
) -> None:
    """Install this code beside the code that is there, check its configuration with it, drain, switch, wait; go back
    where it does not become ready."""
    layout = daemon_layout(name, root)
    context.obj = layout.config
    _install(parts_of(layout, load_settings(context), wait), None, dry_run=dry_run)


def uninstall(
    context: typer.Context,
    *,
    agent: Agent = False,
    name: Name = NAME,
    root: Root = Path("/"),
    purge: Annotated[bool, typer.Option(help="Also delete state, keys, logs, configuration and account.")] = False,
    dry_run: DryRun = False,
) -> None:
    """End the service and remove it; state, keys, logs and configuration stay unless `--purge`."""
    from service.launchd.install import uninstall as plan

    layout = layout_of(context, agent, name, root)
    _carry_out(plan(parts_of(layout, settings_of(context, layout), 0), purge=purge), layout, dry_run=dry_run)


def restart(
    context: typer.Context,
    *,
    agent: Agent = False,
    name: Name = NAME,
    wait: Wait = 900,
    dry_run: DryRun = False,
) -> None:
    """Drain, end, start, and wait until it is ready."""
    from service.launchd.install import restart as plan

    layout = layout_of(context, agent, name, Path("/"))
    with _explained():
        steps = plan(parts_of(layout, settings_of(context, layout), wait))
    _carry_out(steps, layout, dry_run=dry_run)


def status(
    context: typer.Context,
    *,
    agent: Agent = False,
    name: Name = NAME,
    root: Root = Path("/"),
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A key (0600) with the scope admin: tells of the last reload.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What launchd, the service's own notes, its plist and `/readyz` say. Exit code 1 when it is not ready."""
    layout = layout_of(context, agent, name, root)
    found = gather(context, layout, key_file)
    if as_json:
        print_json(found)
    else:
        print_table(("what", "said"), [(key, _said(value)) for key, value in found.items() if value is not None])
    if not found["ready"]:
        raise typer.Exit(1)


def logs(
    context: typer.Context,
    *,
    agent: Agent = False,
    name: Name = NAME,
    root: Root = Path("/"),
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many at most, of each file.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they grow; Ctrl-C ends it.")] = False,
) -> None:
    """Print the end of the service's log and of what went to standard error."""
    import subprocess
    from contextlib import suppress

    layout = layout_of(context, agent, name, root)
    there = [str(each) for each in (layout.log, layout.crash_log) if each.is_file()]
    if not there:
        typer.echo(f"mlxd: nothing in {layout.logs} yet", err=True)
        raise typer.Exit(1)
    sys.stdout.flush()
    with suppress(KeyboardInterrupt):
        tail = ["/usr/bin/tail", "-n", str(lines), *(["-F"] if follow else []), *there]
        raise typer.Exit(subprocess.run(tail, check=False).returncode)  # noqa: S603


def render(context: typer.Context, *, agent: Agent = False, name: Name = NAME, root: Root = Path("/")) -> None:
    """Print the plist that `install` would write."""
    from service.launchd.plist import Job

    settings = load_settings(context)
    layout = agent_layout(context, settings, name) if agent else daemon_layout(name, root)
    job = Job.of(layout, settings, agent_interpreter=Path(sys.executable) if agent else None)
    typer.echo(job.render().decode(), nl=False)


def _said(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return when(value)
        case list():
            return "\n".join(map(str, value)) or "none"
        case _:
            return str(value)


def _install(parts: Parts, model: Model | None, *, dry_run: bool) -> None:
    from service.launchd.environment import Source
    from service.launchd.install import Daemon, install, refusals

    daemon = Daemon(Source.running(), model)
    if found := list(refusals(parts, daemon)):
        for line in found:
            typer.echo(f"mlxd: {line}", err=True)
        raise typer.Exit(os.EX_CONFIG)
    _carry_out(install(parts, daemon), parts.layout, dry_run=dry_run)


def _install_agent(context: typer.Context, settings: Settings, name: str, wait: float, *, dry_run: bool) -> None:
    from service.launchd.install import install_agent

    layout = agent_layout(context, settings, name)
    parts = parts_of(layout, settings, wait)
    _carry_out(install_agent(parts, Path(sys.executable)), layout, dry_run=dry_run)


def _carry_out(plan: Plan, layout: Layout, *, dry_run: bool) -> None:
    from service.launchd.plan import PlanFailed

    typer.echo("\n".join(plan.lines()))
    if dry_run or plan.nothing_to_do:
        typer.echo("dry run: nothing was changed" if dry_run else "nothing to do")
        return
    if layout.account is not None and not layout.staged and os.geteuid() != 0:
        typer.echo("mlxd: this needs root: sudo", err=True)
        raise typer.Exit(os.EX_NOPERM)
    typer.echo("---")
    try:
        plan.run(typer.echo)
    except PlanFailed as failed:
        typer.echo(f"mlxd: {failed}", err=True)
        for line in failed.left:
            typer.echo(f"mlxd: could not be undone: {line}", err=True)
        raise typer.Exit(1) from None
    typer.echo("done")


@contextmanager
def _explained() -> Iterator[None]:
    from service.launchd.launchctl import LaunchdError
    from service.launchd.plan import StepFailed

    try:
        yield
    except (LaunchdError, StepFailed) as error:
        typer.echo(f"mlxd: {error}", err=True)
        raise typer.Exit(1) from None
