"""What every section of the configuration is made of: the frozen group, and the types of its fields."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Secret:
    """Marks a setting whose file holds a secret. `enforced`: the service refuses one that others may read."""

    enforced: bool = True


FilePath = Annotated[Path, AfterValidator(_absolute)]
OptionalFile = Annotated[FilePath | None, BeforeValidator(_given)]
SecretFile = Annotated[FilePath | None, BeforeValidator(_given), Secret()]
Network = Annotated[str, AfterValidator(_network)]


@dataclass(frozen=True, slots=True)
class SecretSetting:
    """A setting that names a secret's file, by its dotted key."""

    key: str
    file: Path
    enforced: bool


def secret_settings(group: BaseModel, prefix: str = "") -> Iterator[SecretSetting]:
    """Every secret's file that is configured, however deep."""
    for name, field in type(group).model_fields.items():
        key, value = f"{prefix}{name}", getattr(group, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Secret)]
        if marks and value is not None:
            yield SecretSetting(key, value, marks[0].enforced)
        members = value if isinstance(value, tuple) else (value,)
        for number, member in enumerate(each for each in members if isinstance(each, BaseModel)):
            yield from secret_settings(member, f"{key}[{number}]." if isinstance(value, tuple) else f"{key}.")
