"""What differs between the settings that run and those of the files now, and which of it a reload puts in force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from service.settings import Settings, keys

RELOADABLE = frozenset(
    {
        "log.level",
        "limits.plans",
        "limits.failed_authentication_per_minute",
        "auth.issuers",
    }
)
"""Every other key needs a restart. docs/configuration.md has the same list."""


def changed(running: Settings, found: Settings) -> Sequence[str]:
    """The keys, as `section.key`, whose values differ; in the order of the documentation."""
    return tuple(key for key in keys() if _value(running, key) != _value(found, key))


def _value(settings: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)


def with_keys(running: Settings, found: Settings, taken: Iterable[str]) -> Settings:
    """`running` with the values that `found` has for the `taken` keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key in taken:
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = _value(found, key)
    update = {section: getattr(running, section).model_copy(update=values) for section, values in sections.items()}
    return running.model_copy(update=update)
