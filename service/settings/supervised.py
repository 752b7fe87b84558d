"""The section of what only a start under a supervisor does (`mlxd serve --supervised`)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from service.settings.base import Group

HOST_LOCK_WORDS = ("auto", "off")


class SupervisedSettings(Group):
    give_up_after: float = Field(
        600.0, ge=0, description="Seconds for which a missing model, a taken port or another engine is waited for."
    )
    backoff_first: float = Field(
        1.0, gt=0, le=3600, description="Seconds before the second try, and after one start that failed; doubles."
    )
    backoff_max: float = Field(300.0, gt=0, le=3600, description="Most seconds before a start, however many failed.")
    stable_after: float = Field(
        60.0, ge=0, le=3600, description="Seconds of being ready after which a start has not failed, whatever comes."
    )
    max_failed_starts: int = Field(
        10, ge=1, le=30, description="Starts in a row that ended before they were ready, after which it stays down."
    )
    safe_mode_deaths: int = Field(
        3, ge=1, le=30, description="Deaths within an hour after which it starts in safe mode."
    )
    safe_mode_run: float = Field(
        3600.0, ge=0, description="Seconds of being ready in safe mode after which the next start is a normal one."
    )
    host_lock: str = Field(
        "auto", description="One engine on this host: `auto` (when supervised), `off`, or a lock file for every start."
    )

    @field_validator("host_lock")
    @classmethod
    def _is_a_word_or_a_path(cls, given: str) -> str:
        if given not in HOST_LOCK_WORDS and not Path(given).is_absolute():
            raise ValueError("must be auto, off, or an absolute path")
        return given
