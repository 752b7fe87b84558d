"""Redis as the store that instances share: request rates through `limits.aio`, token budgets by a script of ours.

The library's strategies can neither settle nor hold debt: a negative hit is ignored, or after a window has changed
grants more than the limit. Imported only where `limits.redis_url_file` is set: redis-py is an extra.

A breaker stands in front. After a few failures in a row nobody waits any more, and a task off the request path asks
until Redis answers again. Redis' own clock tells the time, so that the instances' clocks need not agree.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

from limits import RateLimitItem
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.limits.breaker import Breaker
from service.limits.request_rate import KNOWN_LIMITS, parse_limits
from service.limits.shared import Taken
from service.limits.states import RateState
from service.observability.logging import get_logger
from service.settings import ConfigurationError, LimitsSettings, PlanSettings, read_private

log = get_logger(__name__)

T = TypeVar("T")

FAILURES = (RedisError, OSError)
"""What asking may raise; TimeoutError is an OSError."""

MAX_CONNECTIONS = 16
PREFIX = "mlxd"

BUCKET = """
-- KEYS[1] the budget; ARGV: capacity, tokens to take (negative: give back), 1 to take whatever is there.
local capacity, tokens, always = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local kept = redis.call('HMGET', KEYS[1], 'level', 'at', 'capacity')
local level = capacity
if kept[1] then
  -- A changed budget stays as full as it was. A clock put back refills nothing.
  level = tonumber(kept[1]) * capacity / tonumber(kept[3])
  level = math.min(capacity, level + math.max(0, now - tonumber(kept[2])) * capacity / 60)
end
local allowed = always or tokens <= level + 0.000001
if allowed then
  level = math.min(capacity, level - tokens)
  redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', now),
             'capacity', ARGV[1])
  -- Once it is full it is as good as absent.
  redis.call('PEXPIRE', KEYS[1], math.ceil((capacity - level) * 60000 / capacity) + 1000)
end
return {allowed and 1 or 0, string.format('%.17g', level)}
"""


def read_url(settings: LimitsSettings) -> str:
    """The URL of the shared Redis. Raises ConfigurationError."""
    assert settings.redis_url_file is not None
    try:
        text = read_private(settings.redis_url_file).decode("ascii").strip()
    except FileNotFoundError:
        raise ConfigurationError(f"limits.redis_url_file: {settings.redis_url_file}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigurationError("limits.redis_url_file: holds no URL") from None
    if not text.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigurationError("limits.redis_url_file: the URL must begin with redis://, rediss:// or unix://")
    return text


class RedisStore:
    """A SharedStore. Belongs to the event loop's thread; opens no connection when it is made.

    It counts as down until `run` has reached it once. `report` is told at the start and whenever that changes.
    Raises ConfigurationError for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        settings: LimitsSettings,
        report: Callable[[bool], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._timeout = settings.redis_timeout
        self._retry_interval = settings.redis_retry_interval
        self._breaker = Breaker(report)
        self._sleep = sleep
        self._redis = Redis(connection_pool=_pool(url, self._timeout))
        self._bucket = self._redis.register_script(BUCKET)
        self._windows = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=PREFIX,
            connection_pool=self._redis.connection_pool,  # type: ignore[arg-type]  # documented, but not in the type
        )
        self._rates = SlidingWindowCounterRateLimiter(self._windows)
        self._limits = lru_cache(KNOWN_LIMITS)(parse_limits)
        self._owed: dict[tuple[str, int], int] = {}
        self._owing = asyncio.Event()
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._asking: set[asyncio.Task[Any]] = set()

    @property
    def up(self) -> bool:
        """Whether requests ask Redis at all."""
        return self._breaker.closed

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Reach Redis again whenever it is lost, and settle, while the block runs; then close."""
        tasks = [
            asyncio.create_task(self._recover(), name="redis-recover"),
            asyncio.create_task(self._settle(), name="redis-settle"),
        ]
        for task in tasks:
            task.add_done_callback(_ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *self._asking, return_exceptions=True)
            await self._pay()
            await self._redis.aclose(close_connection_pool=True)

    async def hit(self, principal_id: str, plan: PlanSettings) -> RateState | None:
        """See SharedStore. The windows are approximate by a request or two: sliding counters, not a list of times."""
        return await self._ask(partial(self._hit, principal_id, plan))

    async def _hit(self, principal_id: str, plan: PlanSettings) -> RateState:
        minute, _ = self._limits(plan.requests_per_minute, plan.request_burst)
        allowed = await self._rates.hit(minute, principal_id)
        used, next_one, reset_after = await self._window(minute, principal_id)
        return RateState(
            allowed=allowed,
            limit=minute.amount,
            remaining=max(0, minute.amount - used) if allowed else 0,
            reset_after=reset_after,
            retry_after=0.0 if allowed else next_one,
        )

    async def _window(self, limit: RateLimitItem, principal_id: str) -> tuple[int, float, float]:
        """How many count now, seconds until one fewer does, and until none does.

        Bounded by two windows, in case Redis' clock was put back.
        """
        length = limit.get_expiry()
        previous, previous_ttl, current, current_ttl = await self._windows.get_sliding_window(
            limit.key_for(principal_id), length
        )
        used = int(previous * previous_ttl / length) + current
        waits = [previous_ttl % (length / previous)] if previous else []
        waits += [current_ttl - length] if current else []
        full = max(current_ttl if current else 0.0, previous_ttl if previous else 0.0)
        most = 2.0 * length
        return used, min(most, max(0.001, min(waits, default=0.0))), min(most, full)

    async def take(self, principal_id: str, plan: PlanSettings, tokens: int) -> Taken | None:
        def too_late(taken: Taken) -> None:
            if taken.allowed:
                self.give_back(principal_id, plan, tokens)

        change = partial(self._change, principal_id, plan.tokens_per_minute, tokens, always=False)
        return await self._ask(change, too_late=too_late)

    def give_back(self, principal_id: str, plan: PlanSettings, tokens: int) -> None:
        budget = (principal_id, plan.tokens_per_minute)
        self._owed[budget] = self._owed.get(budget, 0) + tokens
        self._owing.set()

    async def _change(self, principal_id: str, capacity: int, tokens: int, *, always: bool) -> Taken:
        key = f"{PREFIX}:tokens:{principal_id}"
        allowed, level = await self._bucket(keys=[key], args=[capacity, tokens, int(always)])
        return Taken(bool(allowed), float(level))

    async def _settle(self) -> None:
        while True:
            await self._owing.wait()
            await self._pay()

    async def _pay(self) -> None:
        """Send what was given back since; what cannot be sent is dropped, and refills within a minute or so."""
        self._owing.clear()
        while self._owed:
            (principal_id, capacity), tokens = self._owed.popitem()
            await self._ask(partial(self._change, principal_id, capacity, -tokens, always=True))

    async def _ask(
        self, work: Callable[[], Coroutine[Any, Any, T]], *, too_late: Callable[[T], None] = lambda _: None
    ) -> T | None:
        """The answer, or None at once while the breaker is open, and None after `redis_timeout` at the latest.

        What has begun is never cancelled, not even when the client leaves: a connection that is cut in the middle of
        an exchange could take one answer for another. It ends by the connection's own timeouts; an answer that
        nobody waits for any more goes to `too_late`.
        """
        if not self.up:
            return None
        until = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(until):
                await self._places.acquire()
        except TimeoutError:  # too many ask at once, which says nothing about Redis
            return None
        began = self._breaker.begin()
        asking = self._begin(work())
        asking.add_done_callback(lambda _: self._places.release())
        in_time = False
        try:
            in_time = bool((await asyncio.wait({asking}, timeout=until - asyncio.get_running_loop().time()))[0])
        finally:
            if not in_time:
                asking.add_done_callback(partial(_pass_on, to=too_late))
        try:
            if not in_time:
                raise TimeoutError
            answer = asking.result()
        except FAILURES as error:
            self._breaker.failed(began, error)
            return None
        self._breaker.succeeded()
        return answer

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        asking = asyncio.create_task(work)
        self._asking.add(asking)
        asking.add_done_callback(self._begun_is_done)
        return asking

    def _begun_is_done(self, asking: asyncio.Task[Any]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # known to whoever waited; when nobody did it is nobody's

    async def _recover(self) -> None:
        """Half-open: one probe at a time, and no request waits for it."""
        while True:
            await self._breaker.opened.wait()
            while not await self._probe():
                await self._sleep(self._retry_interval)
            self._breaker.close()

    async def _probe(self) -> bool:
        """Whether Redis runs our script: it is there, lets us in, is no replica and has memory."""
        asking = self._begin(self._change("", 60, 0, always=True))
        await asyncio.wait({asking})
        return not isinstance(asking.exception(), FAILURES) and asking.result() is not None


def _pass_on(task: asyncio.Task[T], *, to: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        to(task.result())


def _ended(task: asyncio.Task[None]) -> None:
    """One that dies is a bug; then the local limits stay in force, or what is given back is dropped."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("shared_limits_task_died", task=task.get_name(), exc_info=error)


def _pool(url: str, timeout: float) -> BlockingConnectionPool:
    try:
        return BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # by default redis-py tries again, on the request's time
        )
    except ValueError:
        raise ConfigurationError("limits.redis_url_file: the URL cannot be used") from None
