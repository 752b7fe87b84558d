"""What the commands of `mlxd service` work on: which installation is meant, and what can be learnt of it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from service.cli.context import load_settings
from service.cli.reach import admin_api, configured

if TYPE_CHECKING:
    from service.launchd.environment import Model
    from service.launchd.install import Parts
    from service.launchd.launchctl import Launchd
    from service.launchd.layout import Layout
    from service.launchd.readiness import Readiness
    from service.settings import Settings

LAST_LINES = 15


def daemon_layout(name: str, root: Path) -> Layout:
    """A daemon's, with `root` in front of its paths."""
    from service.launchd.layout import Layout

    return Layout.daemon(name=name, root=root.absolute())


def agent_layout(context: typer.Context, settings: Settings, name: str) -> Layout:
    """An agent's, of this user and this invocation's configuration."""
    from service.launchd.layout import Layout

    if context.obj is None:
        raise typer.BadParameter("an agent needs a configuration: mlxd --config FILE service ...", param_hint="--agent")
    state = settings.server.state_dir
    return Layout.agent(home=Path.home(), uid=os.getuid(), config=context.obj.absolute(), state=state, name=name)


def layout_of(context: typer.Context, agent: bool, name: str, root: Path) -> Layout:
    """The one that is meant."""
    return agent_layout(context, load_settings(context), name) if agent else daemon_layout(name, root)


def settings_of(context: typer.Context, layout: Layout) -> Settings:
    """The installed configuration, or where there is none this invocation's. One that cannot be used counts as the
    defaults: what it is needed for here is how long an end may take, and where to ask."""
    from service.settings import ConfigurationError, Settings

    try:
        return Settings.load(layout.config if layout.config.is_file() else context.obj)
    except ConfigurationError as error:
        typer.echo(f"mlxd: the configuration cannot be used: {error}", err=True)
        return Settings()


def model_of(settings: Settings, folder: Path | None) -> Model:
    """The model to install: `folder`, or the configured one. Nothing is downloaded; code 69 when it is not here."""
    from service.engine.models import resolve
    from service.errors import ModelUnavailable
    from service.launchd.environment import Model

    reference = settings.model.reference if folder is None else str(folder.absolute())
    try:
        found = resolve(reference, state_dir=settings.server.state_dir, offline=True)
    except ModelUnavailable as error:
        typer.echo(f"mlxd: {error.message}; or bring it with `mlxd model fetch`, or name its folder: --model", err=True)
        raise typer.Exit(os.EX_UNAVAILABLE) from None
    return Model(found.name, found.path)


def parts_of(layout: Layout, settings: Settings, wait: float) -> Parts:
    """What a plan needs; launchd and the accounts only where they are, and for what is not staged."""
    from service.launchd import launchctl, readiness
    from service.launchd.install import Parts

    launchd = launchd_of(layout)
    if launchd is None:
        typer.echo("mlxd: launchd is not asked: this is not macOS, or the installation has a --root", err=True)
        return Parts(layout=layout, settings=settings, launchd=None)
    return Parts(
        layout=layout,
        settings=settings,
        launchd=launchd,
        accounts=launchctl.Dscl(),
        wait_ready=partial(
            readiness.wait,
            partial(_probe, settings),
            launchd,
            timeout=wait,
            explain=lambda: last_words(layout),
        ),
    )


def launchd_of(layout: Layout) -> Launchd | None:
    """This machine's, where it has one and the installation is not below a prefix."""
    from service.launchd.launchctl import Launchctl

    return None if layout.staged or sys.platform != "darwin" else Launchctl(layout.domain, layout.name)


def gather(context: typer.Context, layout: Layout, key_file: Path | None) -> dict[str, Any]:
    """What is known of an installation, by name; None for what is not. `key_file` opens `/admin/status`."""
    from service.launchd.launchctl import LaunchdError
    from service.launchd.notes import last_start

    settings = settings_of(context, layout)
    found: dict[str, Any] = {
        "label": layout.target,
        "version": layout.current.readlink().name if layout.current.is_symlink() else None,
        "plist": str(layout.plist) if layout.plist.is_file() else "not installed",
        "plist_problems": _plist_problems(layout, settings),
    }
    try:
        launchd = launchd_of(layout)
        seen = None if launchd is None else launchd.look()
        said = "is not here" if launchd is None else "not loaded" if seen is None else seen.state
        found |= {"launchd": said, "pid": seen and seen.pid, "runs": seen and seen.runs}
        found |= {"last_exit": seen and seen.last_exit}
    except LaunchdError as error:
        found["launchd"] = str(error)
    if (start := last_start(layout.state)) is not None:
        found |= {"started": start.began, "became_ready": start.ready, "ended": start.ended}
        found |= {"exit_code": start.exit_code, "reason": start.reason or None, "safe_mode": start.safe_mode or None}
    answer = _probe(settings)
    found |= {"ready": answer.ready, "state": answer.state, "reasons": list(answer.reasons)}
    return found | (_reload(settings, key_file) if key_file is not None and answer.reachable else {})


def _reload(settings: Settings, key_file: Path) -> dict[str, Any]:
    """How the last reload of the running service ended; nothing before the first."""
    with admin_api(settings, None, key_file) as call:
        last = call("GET", "/admin/status").get("reload") or {}
    return {f"reload_{key}": last[key] for key in ("at", "problems", "restart_needed") if key in last}


def _plist_problems(layout: Layout, settings: Settings) -> list[str] | None:
    from service.launchd.plist import problems

    try:
        return problems(layout.plist.read_bytes(), settings)
    except OSError:
        return None


def _probe(settings: Settings) -> Readiness:
    from service.launchd.readiness import Readiness, ask

    try:
        return ask(configured(settings))
    except typer.BadParameter as error:
        return Readiness(ready=False, reachable=False, state=None, reasons=(error.message,))


def last_words(layout: Layout) -> str:
    """What the service said at last, for the message of a plan that failed."""
    from service.launchd.notes import last_lines, last_start

    start = last_start(layout.state)
    words = [f"it noted: {start.reason}"] if start is not None and start.reason else []
    for path in (layout.log, layout.crash_log):
        if lines := last_lines(path, LAST_LINES):
            words += [f"last lines of {path}:", *lines]
    return "\n".join(words)
