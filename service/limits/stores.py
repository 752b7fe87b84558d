"""What limits keep outside this process: the Redis that instances share, and the database with the usage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from service.auth.principal import DEFAULT_PLAN
from service.limits.usage_log import UsageLog
from service.observability.metrics import Metrics
from service.settings import ConfigurationError, LimitsSettings, Settings
from service.storage import usage
from service.storage.opening import Storage
from service.storage.usage import UsageRow

if TYPE_CHECKING:
    from service.limits.redis_store import RedisStore


def shared_store(settings: Settings, metrics: Metrics) -> RedisStore | None:
    """The Redis of the configuration; redis-py, an extra, is first imported here."""
    if settings.limits.redis_url_file is None:
        return None
    try:
        from service.limits.redis_store import RedisStore, read_url  # noqa: PLC0415 - an extra
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise ConfigurationError("limits.redis_url_file: needs an extra: pip install 'mlxd[redis]'") from None
    return RedisStore(read_url(settings.limits), settings.limits, metrics.limits_shared_store_up.set)


def check_quotas(limits: LimitsSettings, storage: Storage | None) -> None:
    """Raises ConfigurationError for a quota that could not be told, because no usage is kept."""
    plan = limits.plans[DEFAULT_PLAN]
    if storage is None and not plan.daily_tokens == plan.monthly_tokens == "unlimited":
        raise ConfigurationError(f"limits.plans.{DEFAULT_PLAN}: a quota needs auth.enabled, and its database")


def usage_log(
    settings: Settings, metrics: Metrics, storage: Storage | None, now: Callable[[], float]
) -> UsageLog | None:
    """What writes usage into `storage`, where there is one."""
    if storage is None:
        return None

    async def write(rows: Sequence[UsageRow]) -> None:
        await asyncio.wrap_future(storage.write(lambda connection: usage.append(connection, rows)))

    async def prune(before: float, limit: int) -> int:
        return await asyncio.wrap_future(storage.write(lambda connection: usage.prune(connection, before, limit)))

    found = UsageLog(
        write, on_lost=metrics.usage_rows_lost.inc, prune=prune, keep_days=settings.storage.usage_days, now=now
    )
    metrics.usage_rows_pending.set_function(lambda: found.pending)
    return found


def totals(storage: Storage | None) -> Callable[[str, float], Awaitable[int]]:
    """The tokens that a principal has used since a time. Raises StorageUnavailable."""

    async def totals(principal_id: str, since: float) -> int:
        assert storage is not None, "without storage no plan has a quota"
        return await asyncio.wrap_future(storage.read(lambda connection: usage.totals(connection, principal_id, since)))

    return totals
