"""The list of checks, in the order in which an operator reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from service.doctor import launch, machine, model, network, ownership, storage
from service.doctor.finding import Finding, Verdict
from service.doctor.surroundings import Surroundings

Check = Callable[[Surroundings], Iterable[Finding]]

CHECKS: Sequence[Check] = (
    machine.platform,
    model.model,
    model.memory,
    machine.sleep,
    machine.files,
    machine.clock,
    machine.disk,
    ownership.permissions,
    storage.database,
    network.ports,
    network.issuers,
    launch.plists,
    launch.last_start,
    model.speed,
)


def examine(around: Surroundings, checks: Sequence[Check] = CHECKS) -> Sequence[Finding]:
    """Everything that the checks find."""
    return [finding for check in checks for finding in check(around)]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing fails."""
    return all(each.verdict is not Verdict.FAIL for each in findings)
