"""What commands share: the settings of this invocation, and how a wrong configuration is told."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from service.settings import Settings

Explain = Callable[[], AbstractContextManager[None]]


def load_settings(context: typer.Context, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings of all layers, the command line's `overrides` (None: not given) included."""
    with explained():
        return settings_loader(context, overrides)()


def settings_loader(context: typer.Context, overrides: Mapping[str, Any] | None = None) -> Callable[[], Settings]:
    """Reads these settings, each time that it is called. Raises ConfigurationError."""
    from service.settings import Settings

    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    config: Path | None = context.obj
    return lambda: Settings.load(config, given)


def prepare(settings: Settings, *, log_file: bool = False, explain: Explain | None = None) -> None:
    """What must be true of the process before mlx and fastapi are imported; with `log_file` the log goes there.

    `explain` tells what is wrong with the settings, and ends the command.
    """
    from service.observability.logging import configure, log_uncaught
    from service.settings import ConfigurationError, forget_outside_telemetry, prefer_for_cuda, private_tmpdir

    log = settings.log
    with (explain or explained)():
        private_tmpdir(settings.server.state_dir)
        forget_outside_telemetry()
        prefer_for_cuda()
        try:
            configure(level=log.level, fmt=log.format, queue_lines=log.queue_lines, file=log.file if log_file else None)
        except OSError as error:
            raise ConfigurationError(f"log.file: {log.file}: {error.strerror}") from None
    log_uncaught()


@contextmanager
def staying_down(config: Path | None) -> Iterator[None]:
    """Turn a configuration error into one line of the log, the reason in the ledger of starts, and exit code 0: another
    start of a supervisor's would end alike."""
    from service.observability.logging import configure, flush, get_logger
    from service.settings import ConfigurationError, Settings
    from service.supervision.starts import StartLedger

    try:
        yield
    except ConfigurationError as error:
        if not logging.getLogger().handlers:  # it is the logging's own section that may be wrong
            configure()
        reasons = str(error).splitlines()
        get_logger(__name__).error("stays_down", reason="the configuration cannot be used", problems=reasons)
        StartLedger(Settings.state_dir_of(config)).refuse(f"configuration: {'; '.join(reasons)}")
        flush()
        raise typer.Exit(os.EX_OK) from None


@contextmanager
def explained() -> Iterator[None]:
    """Turn a configuration error into one line per problem on standard error and exit code 78."""
    from service.settings import ConfigurationError

    try:
        yield
    except ConfigurationError as error:
        for line in str(error).splitlines():
            typer.echo(f"mlxd: configuration: {line}", err=True)
        raise typer.Exit(os.EX_CONFIG) from None


@contextmanager
def with_storage(context: typer.Context) -> Iterator[Settings]:
    """The settings, with logging set up and every failure of storage told in one line."""
    from service.errors import InvalidRequest, StorageUnavailable
    from service.observability.logging import configure, flush
    from service.storage.failures import Reason, StorageFailure

    settings = load_settings(context)
    configure(level=settings.log.level, fmt=settings.log.format, queue_lines=settings.log.queue_lines)
    try:
        with explained():
            try:
                yield settings
            finally:
                flush()  # the log before the last word
    except InvalidRequest as error:
        typer.echo(f"mlxd: {error.message}", err=True)
        raise typer.Exit(2) from None
    except StorageUnavailable as error:
        typer.echo(f"mlxd: {error.message}", err=True)
        damaged = isinstance(error, StorageFailure) and error.reason is Reason.DAMAGED
        raise typer.Exit(1 if damaged else os.EX_UNAVAILABLE) from None
