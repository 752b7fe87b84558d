"""The file of results, `mlxd-bench/1`: what was asked of whom, and the figures of each load.

`docs/performance.md` has its schema. It holds no key, no prompt and no output.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service import __version__
from service.bench.client import Target
from service.bench.summary import Objective, Summary
from service.bench.workload import Workload

SCHEMA = "mlxd-bench/1"


class NotAReport(ValueError):
    """The file is none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Who was asked what, and what is good."""

    name: str
    target: Target
    workload: Workload
    objective: Objective


@dataclass(frozen=True, slots=True)
class Report:
    """A file of results as it was read. `loads` are summaries as they were written."""

    name: str
    loads: Sequence[Mapping[str, Any]]


def as_json(setup: Setup, loads: Sequence[Summary], *, made_at: str) -> dict[str, Any]:
    """The results as they are written."""
    target, workload = setup.target, setup.workload
    return {
        "schema": SCHEMA,
        "name": setup.name,
        "made_at": made_at,
        "mlxd": __version__,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "target": {"url": target.url, "api": target.api, "model": target.model},
        "workload": {
            "prompt": str(workload.prompt),
            "unit": "words" if workload.ids is None else "tokens",
            "output_tokens": str(workload.output),
            "shared_prefix": workload.shared_prefix,
            "turns": workload.turns,
            "sampling": workload.mix,
            "seed": workload.seed,
            "extra": dict(workload.extra),
        },
        "objective": asdict(setup.objective),
        "loads": [asdict(load) for load in loads],
    }


def parse(text: str) -> Report:
    """What was written. Raises NotAReport."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise NotAReport(f"is no JSON: {error}") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise NotAReport(f"is no {SCHEMA}")
    return Report(str(value["name"]), value["loads"])
