"""`mlxd doctor`: what an operator would check by hand. Changes nothing, beside a running service or without one.

Exit code 0 when nothing fails, 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.context import load_settings, prepare
from service.cli.output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from service.doctor.finding import Finding
    from service.doctor.surroundings import Surroundings
    from service.settings import Settings


def doctor(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Load the model here and measure it; leaves a record of its speed.")
    ] = False,
) -> None:
    """Check the machine, the model, the state and the network; say what to mend."""
    settings = load_settings(context)
    if speed:
        prepare(settings)
    else:
        _log_quietly(settings)
    from service.doctor.checks import examine, healthy

    findings = examine(_surroundings(settings, speed=speed))
    _print(findings, as_json=as_json)
    code = 0 if healthy(findings) else 1
    if speed:
        from service.serve import leave_now

        leave_now(code)  # mlx may abort while the interpreter finalises
    raise typer.Exit(code)


def _log_quietly(settings: Settings) -> None:
    from service.observability.logging import configure

    configure(level="error", fmt=settings.log.format, queue_lines=settings.log.queue_lines)


def _surroundings(settings: Settings, *, speed: bool) -> Surroundings:
    from service.doctor.surroundings import here

    if not speed:
        return here(settings)
    from service.engine.recording import measure

    return here(settings, lambda: measure(settings))


def _print(findings: Sequence[Finding], *, as_json: bool) -> None:
    from service.doctor.checks import healthy

    if as_json:
        print_json({"ok": healthy(findings), "findings": [asdict(each) for each in findings]})
        return
    shown = {"fail": "FAIL", "warn": "WARN"}
    print_table(
        ("check", "verdict", "what was seen, and the mend"),
        [(each.name, shown.get(each.verdict, each.verdict.value), _words(each)) for each in findings],
    )


def _words(finding: Finding) -> str:
    return f"{finding.seen}\n-> {finding.mend}" if finding.mend else finding.seen
