"""Every series this service exports, in one place: unit, labels, and why the buckets are what they are.

One `Metrics` object with its own registry per process (tests make their own); any thread may count.
Label values come from closed sets only: route templates, methods, status codes, reasons. Suffixes are
vLLM's, so that its dashboards need only another prefix. `docs/metrics.md` is the operator's table.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Probes, refusals and cached prompts are faster than vLLM's first bucket.
_FAST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2)
_VLLM_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
REQUEST_SECONDS = (*_FAST_SECONDS, *_VLLM_SECONDS, 960.0)
"""vLLM's end-to-end latency buckets; a cold prefill on a Mac takes minutes, so the top stays high."""


class Metrics:
    """The series, as attributes. `registry` is rendered by `render`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which no dashboard of ours reads
        self.registry = CollectorRegistry(auto_describe=True)
        self._declare_http()
        self._declare_engine()
        self._declare_tokens()
        self._declare_storage()
        self._declare_limits()

    def _declare_http(self) -> None:
        registry = self.registry
        self.http_requests = Counter(
            "mlxd_http_requests",
            "HTTP requests answered, by route template, method and status (499: the client left first).",
            ("route", "method", "status"),
            registry=registry,
        )
        self.http_request_duration = Histogram(
            "mlxd_http_request_duration_seconds",
            "Seconds from a request's head to the last byte of its answer.",
            ("route",),
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.http_in_flight = Gauge(
            "mlxd_http_requests_in_flight", "HTTP requests being answered now.", registry=registry
        )
        self.http_refused = Counter(
            "mlxd_http_refused",
            "Requests refused while their bytes were parsed, before any route saw them.",
            ("reason",),
            registry=registry,
        )
        self.auth_failures = Counter(
            "mlxd_auth_failures", "Requests whose credential was refused, by reason.", ("reason",), registry=registry
        )
        self.internal_errors = Counter(
            "mlxd_internal_errors",
            "Unexpected exceptions caught by a last resort, by place. Each has a log line; none is normal.",
            ("where",),
            registry=registry,
        )

    def _declare_engine(self) -> None:
        registry = self.registry
        self.requests_running = Gauge("mlxd_num_requests_running", "Rows in prefill or decode.", registry=registry)
        self.requests_waiting = Gauge("mlxd_num_requests_waiting", "Rows waiting in the queue.", registry=registry)
        self.rows_capacity = Gauge("mlxd_rows_capacity", "Most rows decoded in one batch.", registry=registry)
        self.queue_capacity = Gauge("mlxd_queue_capacity", "Most rows that may wait.", registry=registry)
        self.memory_active = Gauge("mlxd_memory_active_bytes", "Bytes of live arrays.", registry=registry)
        self.memory_peak = Gauge("mlxd_memory_peak_bytes", "Most bytes of live arrays so far.", registry=registry)
        self.memory_buffer_cache = Gauge(
            "mlxd_memory_buffer_cache_bytes", "Bytes of freed buffers kept for reuse.", registry=registry
        )
        self.prefix_cache_bytes = Gauge(
            "mlxd_prefix_cache_bytes", "Bytes of KV cache kept of finished prompts.", registry=registry
        )
        self.prefix_cache_entries = Gauge(
            "mlxd_prefix_cache_entries", "Finished prompts kept in the prefix cache.", registry=registry
        )
        self.step_age = Gauge(
            "mlxd_engine_step_age_seconds",
            "Seconds since the engine last finished a step or was idle.",
            registry=registry,
        )
        self.engine_state = Gauge("mlxd_engine_state", "1 for the engine's state.", ("state",), registry=registry)
        self.admission_rejections = Counter(
            "mlxd_admission_rejections", "Rows refused at submission.", ("reason",), registry=registry
        )

    def _declare_tokens(self) -> None:
        registry = self.registry
        self.prompt_tokens = Counter("mlxd_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self.prompt_tokens_cached = Counter(
            "mlxd_prompt_tokens_cached", "Prompt tokens that came from the prefix cache.", registry=registry
        )
        self.generation_tokens = Counter("mlxd_generation_tokens", "Tokens generated.", registry=registry)
        self.request_success = Counter(
            "mlxd_request_success", "Rows that ended normally.", ("finished_reason",), registry=registry
        )
        self.request_failure = Counter(
            "mlxd_request_failure",
            "Rows that ended otherwise: cancelled, or an error's code.",
            ("reason",),
            registry=registry,
        )

    def _declare_storage(self) -> None:
        self.storage_failures = Counter(
            "mlxd_storage_failures",
            "Reads and writes that the database could not do, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.usage_rows_lost = Counter(
            "mlxd_usage_rows_lost",
            "Rows of usage that were given up: more than memory holds while storage could not be written.",
            registry=self.registry,
        )
        self.usage_rows_pending = Gauge(
            "mlxd_usage_rows_pending", "Rows of usage that wait to be written.", registry=self.registry
        )

    def _declare_limits(self) -> None:
        registry = self.registry
        self.limits_refused = Counter(
            "mlxd_limits_refused",
            "Requests refused for a limit of the principal or the address.",
            ("code",),
            registry=registry,
        )
        self.limits_shared_store_up = Gauge(
            "mlxd_limits_shared_store_up",
            "1 while limits are counted in the shared store; 0 without one.",
            registry=registry,
        )
        self.limits_reservations_swept = Counter(
            "mlxd_limits_reservations_swept", "Reservations that nobody settled. None is normal.", registry=registry
        )

    def render(self) -> bytes:
        """The exposition text. Takes milliseconds: call it off the event loop."""
        return generate_latest(self.registry)
