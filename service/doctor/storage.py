"""The database, by what `mlxd db check` looks at, but nothing repaired."""

from __future__ import annotations

from collections.abc import Iterator

from service.doctor.finding import Finding, fail, ok, skipped
from service.doctor.surroundings import Surroundings
from service.settings import ConfigurationError
from service.storage.failures import Reason, StorageFailure
from service.storage.inspection import inspect
from service.storage.location import DEFAULT_NAME


def database(around: Surroundings) -> Iterator[Finding]:
    """File, tables, keys and the audit log's chain."""
    storage, auth = around.settings.storage, around.settings.auth
    if not auth.enabled:
        yield skipped("database", "authentication is off, so there is none")
        return
    ours = not storage.url and storage.url_file is None
    if ours and not (around.state_dir / DEFAULT_NAME).exists():
        yield skipped("database", "there is none yet; it is made at the first start")
        return
    try:
        found = inspect(storage, around.state_dir, repair=False)
    except ConfigurationError as error:
        yield fail("database", str(error), "see above, and docs/storage.md")
    except StorageFailure as failure:
        busy = failure.reason is Reason.LOCKED
        yield fail("database", failure.message, "ask again when the writer has ended" if busy else "docs/storage.md")
    else:
        for each in found:
            name = f"database: {each.name}"
            yield ok(name, each.detail) if each.ok else fail(name, each.detail, "restore a backup: docs/storage.md")
