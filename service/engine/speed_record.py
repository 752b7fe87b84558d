"""How fast the engine was when it warmed up, and how it had been started: a record in the state directory.

launchd may run the same program many times slower than a shell does; only a comparison shows it. `speed.json` has
the newest record of each kind of start. No mlx; any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

from service.engine.pacing import StepCosts
from service.settings import write_private

FILE_NAME = "speed.json"

CHUNK = 512
"""Tokens of the prompt whose reading is told as tokens a second: enough that a chunk's fixed cost is no matter."""


class Started(StrEnum):
    """How a process was started."""

    SUPERVISED = "supervised"
    SHELL = "shell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens a second of one row alone: `decode` of output, `prefill` of its prompt. `at` is seconds since the epoch.

    Only speeds of the same `model`, `device` and `mlx` can be compared.
    """

    at: float
    model: str
    device: str
    mlx: str
    decode: float
    prefill: float

    @classmethod
    def of(cls, costs: StepCosts, *, model: str, device: str, at: float) -> Speed:
        """From what warm-up measured."""
        decode, prefill = costs.decode_base + costs.decode_row, costs.prefill_base + CHUNK * costs.prefill_token
        return cls(
            at=at,
            model=model,
            device=device,
            mlx=version("mlx"),
            decode=1 / max(decode, 1e-9),
            prefill=CHUNK / max(prefill, 1e-9),
        )

    def comparable(self, other: Speed) -> bool:
        """Whether the two differ in nothing but the start."""
        return (self.model, self.device, self.mlx) == (other.model, other.device, other.mlx)


def read(state_dir: Path) -> Mapping[Started, Speed]:
    """The records by kind of start; none where there is no file, or it is not as we wrote it."""
    try:
        found = json.loads((state_dir / FILE_NAME).read_text("utf-8"))
        return {Started(kind): Speed(**fields) for kind, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def record(state_dir: Path, started: Started, speed: Speed) -> None:
    """Replace the record of this kind of start. Blocks. Raises ConfigurationError where it cannot be written."""
    kept = {**read(state_dir), started: speed}
    text = json.dumps({kind: asdict(each) for kind, each in kept.items()}, indent=2)
    write_private(state_dir / FILE_NAME, text.encode() + b"\n", replace=True)
