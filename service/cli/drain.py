"""`mlxd service drain` and `undrain`: what `/admin/drain` does, for an operator or a script at a shell.

Exit codes: 0 when it is drained, or takes work again; 1 where the service refuses, or is not drained in time; 69 where
it cannot be reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from service.cli.context import load_settings
from service.cli.reach import KeyFile, Url, admin_api

PATH = "/admin/drain"
POLL_INTERVAL = 0.25
MARGIN = 15.0
"""Seconds beyond `engine.drain_timeout` at which nothing can be left, unless something is wrong."""

Call = Callable[[str, str], dict[str, Any]]


def drain(
    context: typer.Context,
    *,
    url: Url = None,
    key_file: KeyFile = None,
    wait: Annotated[bool, typer.Option(help="Until nothing is left; otherwise only begin.")] = True,
) -> None:
    """Finish what runs and take no new work; the process stays up, and is not ready."""
    settings = load_settings(context)
    with admin_api(settings, url, key_file) as call:
        found = call("POST", PATH)
        if not found["drained"]:
            typer.echo(f"mlxd: draining; {found['running']} running", err=True)
        if found["drained"] or (wait and drained(call, settings.engine.drain_timeout + MARGIN)):
            typer.echo("mlxd: drained; takes work again after a restart, or: mlxd service undrain")
        elif wait:
            typer.echo("mlxd: not drained in time, or taken back", err=True)
            raise typer.Exit(1)


def drained(
    call: Call,
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Wait for the end of a drain; False when that took too long, or somebody undid it."""
    ends = clock() + timeout
    while clock() < ends:
        found = call("GET", "/admin/status")["drain"]  # which, unlike /admin/drain, is not audited at each call
        if found is None or found["drained"]:
            return found is not None
        sleep(POLL_INTERVAL)
    return False


def undrain(context: typer.Context, *, url: Url = None, key_file: KeyFile = None) -> None:
    """Take work again after a drain."""
    with admin_api(load_settings(context), url, key_file) as call:
        typer.echo(f"mlxd: {call('DELETE', PATH)['state']}")
