"""A list of steps that is printed first, done in order, and undone in reverse order when one of them fails.

A step that finds its work done leaves it alone, so the same plan may be run again. Nothing is deleted for good before
every step has succeeded. Blocks; one thread.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.launchd.launchctl import LaunchdError


class StepFailed(Exception):
    """A step could not be done; the message is one or more sentences for the operator."""


FAILURES = (StepFailed, LaunchdError, OSError, subprocess.SubprocessError)


class Step(ABC):
    """One thing to do. May raise what is in FAILURES, and then has done nothing that `undo` does not take back."""

    @abstractmethod
    def describe(self) -> str:
        """What it will do, in a line."""

    def done(self) -> bool:
        """Whether there is nothing to do. Changes nothing."""
        return False

    @abstractmethod
    def apply(self) -> None:
        """Do it."""

    def undo(self) -> None:  # noqa: B027 - a check has nothing to take back
        """Take it back. Called once, after `apply` began."""

    def commit(self) -> None:  # noqa: B027 - most steps keep nothing
        """Every step succeeded: let go of what `undo` would have needed."""


@dataclass(frozen=True, slots=True)
class Act(Step):
    """A step made of functions, for what is no file."""

    what: str
    do: Callable[[], object]
    back: Callable[[], object] | None = None
    is_done: Callable[[], bool] = field(default=lambda: False)

    def describe(self) -> str:
        return self.what

    def done(self) -> bool:
        return self.is_done()

    def apply(self) -> None:
        self.do()

    def undo(self) -> None:
        if self.back is not None:
            self.back()


class PlanFailed(Exception):
    """A step failed, and what had been done was undone; `left` is what could not be."""

    def __init__(self, why: str, left: Sequence[str] = ()) -> None:
        super().__init__(why)
        self.left = tuple(left)


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order."""

    steps: tuple[Step, ...]

    def lines(self) -> list[str]:
        """What would be done now; steps with nothing to do are marked with `=`. Changes nothing."""
        return [f"{'=' if step.done() else '+'} {step.describe()}" for step in self.steps]

    @property
    def nothing_to_do(self) -> bool:
        return all(step.done() for step in self.steps)

    def run(self, tell: Callable[[str], object]) -> None:
        """Do it, telling each step. Raises PlanFailed after undoing; also when interrupted."""
        begun: list[Step] = []
        try:
            for step in self.steps:
                if not step.done():
                    tell(f"+ {step.describe()}")
                    begun.append(step)
                    step.apply()
        except (*FAILURES, KeyboardInterrupt) as error:
            tell(f"! {_told(error)}")
            raise PlanFailed(_told(error), _undo(begun, tell)) from error
        for step in begun:
            step.commit()


def _undo(begun: Sequence[Step], tell: Callable[[str], object]) -> list[str]:
    left = []
    for step in reversed(begun):
        tell(f"- undo: {step.describe()}")
        try:
            step.undo()
        except FAILURES as error:
            tell(f"! {_told(error)}")
            left.append(f"{step.describe()}: {_told(error)}")
    return left


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
