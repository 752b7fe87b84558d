"""The installation under launchd, and how the last start went."""

from __future__ import annotations

import plistlib
from collections.abc import Iterator

from service.doctor.finding import Finding, fail, ok, skipped, warn
from service.doctor.surroundings import Surroundings
from service.launchd.plist import problems


def plists(around: Surroundings) -> Iterator[Finding]:
    """Each installed property list."""
    installed = [file for file in around.plists if file.exists()]
    if not installed:
        yield skipped("launchd", "nothing is installed")
    for file in installed:
        name = f"launchd: {file.name}"
        try:
            wrong = _problems(file.read_bytes(), around)
        except OSError as error:
            wrong = [f"cannot be read: {error.strerror}"]
        yield fail(name, "; ".join(wrong), "mlxd service install") if wrong else ok(name, f"{file} is sound")


def _problems(data: bytes, around: Surroundings) -> list[str]:
    """Whether it fits the settings is asked of the installation that these settings are of."""
    wrong = problems(data)
    ours = not wrong and plistlib.loads(data).get("WorkingDirectory") == str(around.state_dir)
    return problems(data, around.settings) if ours else wrong


def last_start(around: Surroundings) -> Iterator[Finding]:
    """Why the last supervised start does not serve, if it does not."""
    if around.start_trouble:
        yield warn("last start", around.start_trouble, "mlxd service status")
    else:
        yield ok("last start", "no trouble")
