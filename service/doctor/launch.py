"""The installation under launchd, and how the last start went; by parts that may not be there."""

from __future__ import annotations

from collections.abc import Iterator

from service.doctor.finding import Finding, fail, ok, skipped, warn
from service.doctor.surroundings import Surroundings


def plists(around: Surroundings) -> Iterator[Finding]:
    """Each installed property list."""
    if around.plist_lint is None:
        yield skipped("launchd", "this version of mlxd installs nothing under launchd")
        return
    found = around.plist_lint(around.settings)
    if not found:
        yield skipped("launchd", "nothing is installed")
    for file, problems in found.items():
        name = f"launchd: {file.name}"
        yield fail(name, "; ".join(problems), "mlxd service install") if problems else ok(name, f"{file} is sound")


def last_start(around: Surroundings) -> Iterator[Finding]:
    """Why the last supervised start does not serve, if it does not."""
    if around.start_trouble is None:
        yield skipped("last start", "this version of mlxd keeps no record of starts")
        return
    trouble = around.start_trouble(around.settings)
    yield ok("last start", "no trouble") if trouble is None else warn("last start", trouble, "mlxd service status")
