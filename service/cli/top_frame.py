"""What `mlxd top` shows at a moment: from looks at `/metrics` to numbers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from service.cli.scrape import STARTED, Between, Labels, Scrape

CONSUMERS = 8
"""Of those that used most, so many are shown."""

REASONS = 6

OPERATORS = frozenset({"/", "/health", "/livez", "/readyz", "/metrics", "/admin/status"})
"""Routes that are asked for looking at the service, this view among them: they are no traffic."""

REFUSALS = (
    ("mlxd_limits_refused_total", "code"),
    ("mlxd_admission_rejections_total", "reason"),
    ("mlxd_auth_failures_total", "reason"),
    ("mlxd_http_refused_total", "reason"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Who answers."""

    version: str | None
    model: str | None
    device: str | None
    state: str | None
    uptime_seconds: float | None
    restarted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Tokens a second since the last look; rows now."""

    generation_tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    running: float | None
    max_running: float | None
    waiting: float | None
    max_waiting: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds, over the window. Where nothing was observed there is None."""

    first_token_p50: float | None
    first_token_p95: float | None
    first_token_p99: float | None
    inter_token_p95: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes now. `prefix_hit_rate` is the share of prompt tokens, over the window, that was found in the cache."""

    active: float | None
    peak: float | None
    recommended: float | None
    reserved: float | None
    budget: float | None
    resident: float | None
    prefix_cache: float | None
    prefix_capacity: float | None
    prefix_hit_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """Tokens of requests that ended, in the window and since the service began."""

    tenant: str
    key_id: str
    prompt_tokens: float
    cached_tokens: float
    completion_tokens: float
    total_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One picture. `requests` are a second, by status; `refusals` are counts, by reason; both over the window."""

    interval_seconds: float
    window_seconds: float
    service: Service
    load: Load
    latency: Latency
    memory: Memory
    requests: dict[str, float]
    refusals: dict[str, float]
    consumers: tuple[Consumer, ...]


def frame(window: Scrape, before: Scrape, last: Scrape, *, now: float) -> Frame:
    """The picture at `last`. Rates are since `before`, all that needs many events since `window`; `now` is wall time.

    With two looks, `window` and `before` are the same.
    """
    lately, since = Between(before, last), Between(window, last)
    return Frame(
        interval_seconds=lately.seconds,
        window_seconds=since.seconds,
        service=_service(lately, now),
        load=_load(lately),
        latency=Latency(
            first_token_p50=since.quantile("mlxd_time_to_first_token_seconds", 0.5),
            first_token_p95=since.quantile("mlxd_time_to_first_token_seconds", 0.95),
            first_token_p99=since.quantile("mlxd_time_to_first_token_seconds", 0.99),
            inter_token_p95=since.quantile("mlxd_inter_token_latency_seconds", 0.95),
        ),
        memory=_memory(since),
        requests=_requests(since),
        refusals=_refusals(since),
        consumers=_consumers(since),
    )


def _service(between: Between, now: float) -> Service:
    last = between.last
    started = last.value(STARTED)
    return Service(
        version=last.label("mlxd_build_info", "version"),
        model=last.label("mlxd_build_info", "model"),
        device=last.label("mlxd_build_info", "device"),
        state=last.label("mlxd_engine_state", "state"),
        uptime_seconds=None if started is None else max(0.0, now - started),
        restarted=between.restarted,
    )


def _load(between: Between) -> Load:
    last = between.last
    return Load(
        generation_tokens_per_second=between.rate("mlxd_generation_tokens_total"),
        prompt_tokens_per_second=between.rate("mlxd_prompt_tokens_total"),
        running=last.value("mlxd_num_requests_running"),
        max_running=last.value("mlxd_rows_capacity"),
        waiting=last.value("mlxd_num_requests_waiting"),
        max_waiting=last.value("mlxd_queue_capacity"),
    )


def _memory(between: Between) -> Memory:
    last = between.last
    queries = between.increase("mlxd_prefix_cache_queries_total")
    hits = between.increase("mlxd_prefix_cache_hits_total")
    return Memory(
        active=last.value("mlxd_memory_active_bytes"),
        peak=last.value("mlxd_memory_peak_bytes"),
        recommended=last.value("mlxd_memory_recommended_bytes"),
        reserved=last.value("mlxd_memory_reserved_bytes"),
        budget=last.value("mlxd_memory_budget_bytes"),
        resident=last.value("process_resident_memory_bytes"),
        prefix_cache=last.value("mlxd_prefix_cache_bytes"),
        prefix_capacity=last.value("mlxd_prefix_cache_capacity_bytes"),
        prefix_hit_rate=hits / queries if queries and hits is not None else None,
    )


def _requests(between: Between) -> dict[str, float]:
    def is_traffic(labels: Labels) -> bool:
        return labels.get("route") not in OPERATORS

    found = between.by("mlxd_http_requests_total", "status", wanted=is_traffic)
    if between.seconds <= 0:
        return {}
    return {status: growth / between.seconds for (status,), growth in sorted(found.items())}


def _refusals(between: Between) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, label in REFUSALS:
        for (reason,), growth in between.by(name, label).items():
            found[reason] = found.get(reason, 0.0) + growth
    most = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(most[:REASONS])


def _consumers(between: Between) -> tuple[Consumer, ...]:
    """Those that used most in the window; where nobody used anything, since the service began."""
    name = "mlxd_consumer_tokens_total"
    lately = between.by(name, "tenant", "key_id", "kind")
    found = [
        Consumer(
            tenant=tenant,
            key_id=key_id,
            prompt_tokens=lately.get((tenant, key_id, "prompt"), 0.0),
            cached_tokens=lately.get((tenant, key_id, "cached"), 0.0),
            completion_tokens=lately.get((tenant, key_id, "completion"), 0.0),
            total_tokens=total,
        )
        for (tenant, key_id), total in _totals(between.last, name).items()
    ]
    found.sort(key=lambda one: (-one.prompt_tokens - one.completion_tokens, -one.total_tokens, one.tenant, one.key_id))
    return tuple(found[:CONSUMERS])


def _totals(last: Scrape, name: str) -> dict[tuple[str, str], float]:
    """Prompt and completion tokens since the service began; cached ones are among the former."""
    found: dict[tuple[str, str], float] = {}
    for labels, value in last.each(name):
        if labels.get("kind") != "cached":
            key = (labels.get("tenant", ""), labels.get("key_id", ""))
            found[key] = found.get(key, 0.0) + value
    return found
