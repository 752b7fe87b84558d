"""The configuration that a daemon gets: what was in force where it was installed, with the installation's own paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.launchd.layout import Layout
from service.launchd.ownership import changeable
from service.settings import Settings, as_toml

REPLACED = frozenset({"server.state_dir", "log.file"})
"""Paths that the installation chooses itself, so those of the source are of no matter."""

HEAD = """\
# What differs from the defaults; `mlxd service install` wrote it from the configuration that was in force there, and
# overwrites it only when it is called with another one. Edit it as root; `mlxd service restart` puts it in force.

"""


def render(settings: Settings, layout: Layout, *, model: Path, model_name: str) -> str:
    """TOML of every setting that differs from its default. `model` is the folder where the model is installed."""
    aliases = dict.fromkeys((*settings.model.aliases, *([model_name] if model_name != model.name else [])))
    ours = {
        "server.state_dir": str(layout.state),
        "model.reference": str(model),
        "model.offline": True,
        "model.aliases": list(aliases),
        "log.format": "json",
        "log.file": str(layout.log),
    }
    wanted, usual = flat(settings) | ours, flat(Settings())
    return HEAD + as_toml({key: value for key, value in wanted.items() if value != usual[key]})


def flat(settings: Settings) -> dict[str, Any]:
    """Every key with its value as a file has it."""
    values = settings.model_dump(mode="json")
    return {f"{section}.{key}": value for section, group in values.items() for key, value in group.items()}


def refusals(settings: Settings, *, owners: frozenset[int], below: Path) -> Iterator[str]:
    """Why a daemon cannot have these settings, one sentence each. `owners` may own the files that they name."""
    if settings.auth.development_key:
        yield "auth.development_key: a key in clear is for development; set it to false, and make keys with `mlxd keys`"
    for key, path in _files(settings):
        yield from (f"{key}: {why}" for why in changeable(path, owners=owners, below=below))


def _files(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Every file that the settings name and the installation keeps."""
    yield from (each for each in _paths("", settings.model_dump()) if each[0] not in REPLACED)


def _paths(name: str, value: object) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _paths(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _paths(name, each)
