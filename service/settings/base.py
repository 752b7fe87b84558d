"""What every section of the configuration is made of: the frozen group, and the types of its fields."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Group(BaseModel):
    """A frozen section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


def _given(value: object) -> object:
    """TOML has no null: an empty string stands for "not given"."""
    return None if value == "" else value


FilePath = Annotated[Path, AfterValidator(_absolute)]
OptionalFile = Annotated[FilePath | None, BeforeValidator(_given)]
Network = Annotated[str, AfterValidator(_network)]
