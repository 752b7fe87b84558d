"""Every series this service exports, in one place: unit, labels, and why the buckets are what they are.

One `Metrics` object with its own registry per process (tests make their own); any thread may count. Units are in the
names. Suffixes and buckets are vLLM's, so that its dashboards need only another prefix. Label values come from closed
sets only: route templates, methods, status codes, reasons, sizes of prompts, configured issuers, and as many consumers
as `consumers.py` lets in. `docs/metrics.md` is the operator's table.
"""

from __future__ import annotations

import math
import threading
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from service.observability.process import ProcessCollector
from service.observability.repeated import RepeatedHistogram

# Probes, refusals and cached prompts are faster than vLLM's first bucket.
_FAST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2)
_VLLM_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
HTTP_SECONDS = (*_FAST_SECONDS, *_VLLM_SECONDS, 960.0)
"""vLLM's end-to-end latency buckets; a cold prefill on a Mac takes minutes, so the top stays high."""

PHASE_SECONDS = (*_VLLM_SECONDS, 960.0, 1920.0, 7680.0)
"""vLLM's own, unchanged: what its dashboards and `histogram_quantile` over several servers expect."""

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""vLLM's: from a cached prompt (a millisecond) to a cold one of 100,000 tokens on a small Mac (many minutes)."""

TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""vLLM's: 0.05 is faster than anybody reads, 0.25 is one whole step of the engine, above it a stream stutters."""

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Around `engine.step_target` (0.25), which a step is to keep; a tiny model decodes in a millisecond."""

LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""A millisecond is noise, 0.05 is the house's bound, above 0.25 everybody's stream stands still."""

ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Powers of two, at which a batch's arithmetic changes, up to the most that `engine.max_rows` may be."""

TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500),
    *(1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000),
)
"""vLLM's 1-2-5 series, up to the longest contexts of models that fit into a Mac."""


class Metrics:
    """The series, as attributes."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which no dashboard of ours reads
        self.registry = CollectorRegistry(auto_describe=True)
        self._known: set[Gauge] = set()
        self._lock = threading.Lock()
        self._declare_http()
        self._declare_engine()
        self._declare_memory()
        self._declare_tokens()
        self._declare_requests()
        self._declare_health()
        self._declare_limits()
        self.registry.register(ProcessCollector())

    def _declare_http(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self.http_requests = counter(
            "mlxd_http_requests",
            "HTTP requests answered, by route template, method and status (499: the client left first).",
            ("route", "method", "status"),
        )
        self.http_request_duration = Histogram(
            "mlxd_http_request_duration_seconds",
            "Seconds from a request's head to the last byte of its answer.",
            ("route",),
            buckets=HTTP_SECONDS,
            registry=self.registry,
        )
        self.http_in_flight = gauge("mlxd_http_requests_in_flight", "HTTP requests being answered now.")
        self.http_refused = counter(
            "mlxd_http_refused", "Requests refused while their bytes were parsed, before any route.", ("reason",)
        )
        self.auth_failures = counter(
            "mlxd_auth_failures", "Requests whose credential was refused, by reason.", ("reason",)
        )
        self.internal_errors = counter(
            "mlxd_internal_errors", "Unexpected exceptions caught by a last resort, by place.", ("where",)
        )
        self.otlp_failures = counter(
            "mlxd_otlp_failures", "Attempts to send spans or metrics to the collector that failed.", ("signal",)
        )

    def _declare_engine(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self.requests_running = gauge("mlxd_num_requests_running", "Rows in prefill or decode.")
        self.requests_waiting = gauge("mlxd_num_requests_waiting", "Rows waiting in the queue.")
        self.rows_held = gauge("mlxd_rows_held", "Rows that the engine has not given back, waiting ones included.")
        self.rows_capacity = gauge("mlxd_rows_capacity", "Most rows decoded in one batch.")
        self.queue_capacity = gauge("mlxd_queue_capacity", "Most rows that may wait.")
        self.step_age = gauge(
            "mlxd_engine_step_age_seconds", "Seconds since the engine last finished a step or was idle."
        )
        self.progress_age = gauge(
            "mlxd_engine_progress_age_seconds", "Seconds for which the engine has had work and nothing came of it."
        )
        self.watchdog_trips = counter(
            "mlxd_watchdog_trips", "Times the watchdog has begun to end the process.", ("watch",)
        )
        self.engine_state = gauge("mlxd_engine_state", "1 for the engine's state.", ("state",))
        self.model_load_seconds = gauge("mlxd_model_load_seconds", "Seconds that loading the model took.")
        self.model_warmup_seconds = gauge("mlxd_model_warmup_seconds", "Seconds that warming up took.")
        self.admission_rejections = counter("mlxd_admission_rejections", "Rows refused at submission.", ("reason",))
        self.step_duration = Histogram(
            "mlxd_engine_step_duration_seconds",
            "Seconds of one engine step.",
            buckets=STEP_SECONDS,
            registry=self.registry,
        )
        self.step_rows = Histogram(
            "mlxd_engine_step_rows",
            "Rows that decoded in one engine step; 0: it read prompts, or was the rest of one.",
            buckets=ROWS,
            registry=self.registry,
        )

    def _declare_memory(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self.memory_active = gauge("mlxd_memory_active_bytes", "Bytes of live arrays.")
        self.memory_peak = gauge("mlxd_memory_peak_bytes", "Most bytes of live arrays so far.")
        self.memory_buffer_cache = gauge("mlxd_memory_buffer_cache_bytes", "Bytes of freed buffers kept for reuse.")
        self.memory_reserved = gauge("mlxd_memory_reserved_bytes", "Bytes of the budget that rows are promised.")
        self.memory_budget = gauge("mlxd_memory_budget_bytes", "Bytes for KV caches, prefix cache and activations.")
        self.kv_cache_usage = gauge("mlxd_kv_cache_usage_perc", "Reserved share of the memory budget, 0 to 1.")
        self.memory_recommended = Gauge(
            "mlxd_memory_recommended_bytes", "Bytes that the device recommends to stay below.", registry=None
        )
        self.prefix_cache_bytes = gauge("mlxd_prefix_cache_bytes", "Bytes of KV cache kept of finished prompts.")
        self.prefix_cache_capacity = gauge("mlxd_prefix_cache_capacity_bytes", "Most bytes kept of finished prompts.")
        self.prefix_cache_entries = gauge("mlxd_prefix_cache_entries", "Finished prompts kept in the prefix cache.")
        self.prefix_cache_queries = counter("mlxd_prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_cache_hits = counter("mlxd_prefix_cache_hits", "Prompt tokens found.")

    def _declare_tokens(self) -> None:
        counter = partial(Counter, registry=self.registry)
        self.prompt_tokens = counter("mlxd_prompt_tokens", "Prompt tokens of rows whose prefill has begun.")
        self.prompt_tokens_cached = counter("mlxd_prompt_tokens_cached", "Those that came from the prefix cache.")
        self.generation_tokens = counter("mlxd_generation_tokens", "Tokens generated.")
        self.request_success = counter("mlxd_request_success", "Rows that ended normally.", ("finished_reason",))
        self.request_failure = counter(
            "mlxd_request_failure", "Rows that ended otherwise: cancelled, or an error's code.", ("reason",)
        )
        self.consumer_requests = counter(
            "mlxd_consumer_requests", "Requests that reached the queue, by consumer.", ("tenant", "key_id")
        )
        self.consumer_tokens = counter(
            "mlxd_consumer_tokens",
            "Tokens by consumer; kind: prompt (cached ones included), cached, completion.",
            ("tenant", "key_id", "kind"),
        )

    def _declare_requests(self) -> None:
        seconds = partial(Histogram, buckets=PHASE_SECONDS, registry=self.registry)
        tokens = partial(Histogram, buckets=TOKENS, registry=self.registry)
        self.time_to_first_token = Histogram(
            "mlxd_time_to_first_token_seconds",
            "Seconds from the queue to the first token of a request.",
            ("prompt_size",),
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.inter_token_latency = RepeatedHistogram(
            "mlxd_inter_token_latency_seconds",
            "Seconds between two tokens of a row.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.time_per_output_token = Histogram(
            "mlxd_request_time_per_output_token_seconds",
            "A row's mean seconds between two tokens.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.e2e_latency = seconds(
            "mlxd_e2e_request_latency_seconds", "Seconds of a request from its route to its end.", ("prompt_size",)
        )
        self.queue_time = seconds("mlxd_request_queue_time_seconds", "Seconds that a row waited.")
        self.prefill_time = seconds(
            "mlxd_request_prefill_time_seconds", "Seconds from a row's prefill to its first token.", ("prompt_size",)
        )
        self.decode_time = seconds("mlxd_request_decode_time_seconds", "Seconds from a row's first token to its end.")
        self.inference_time = seconds("mlxd_request_inference_time_seconds", "Seconds of a row's prefill and decode.")
        self.request_prompt_tokens = tokens("mlxd_request_prompt_tokens", "Prompt tokens of a row.")
        self.request_generation_tokens = tokens("mlxd_request_generation_tokens", "Generated tokens of a row.")

    def _declare_health(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self.event_loop_lag = Histogram(
            "mlxd_event_loop_lag_seconds",
            "Seconds by which a timer of the event loop was late.",
            buckets=LAG_SECONDS,
            registry=self.registry,
        )
        self.loop_age = gauge(
            "mlxd_event_loop_heartbeat_age_seconds", "Seconds since the event loop last answered the watchdog."
        )
        self.safe_mode = gauge("mlxd_safe_mode", "1 while the service runs in safe mode.")
        self.recent_deaths = gauge("mlxd_recent_deaths", "Supervised starts that died within the last hour.")
        self.event_loop_tasks = gauge("mlxd_event_loop_tasks", "Tasks of the event loop that are not done.")
        self.log_lines_dropped = counter("mlxd_log_lines_dropped", "Log lines that could not be written in time.")
        self.config_reloads = counter("mlxd_config_reloads", "Reloads of the configuration, by outcome.", ("outcome",))
        self.jwks_refreshes = counter("mlxd_jwks_refreshes", "Reads of an issuer's keys.", ("issuer", "outcome"))
        self.jwks_keys = gauge("mlxd_jwks_keys", "Usable keys of an issuer.", ("issuer",))
        self.jwks_age = gauge("mlxd_jwks_age_seconds", "Seconds since an issuer's keys were read.", ("issuer",))
        self.storage_up = Gauge("mlxd_storage_up", "1 while the database can be used.", registry=None)
        self.state_disk_free = Gauge(
            "mlxd_state_disk_free_bytes", "Free bytes of the volume that holds the state directory.", registry=None
        )
        self.build_info = gauge(
            "mlxd_build_info",
            "1, with what runs as labels.",
            ("version", "python", "mlx", "mlx_lm", "model", "device"),
        )
        self.storage_failures = counter(
            "mlxd_storage_failures", "Reads and writes that the database could not do, by reason.", ("reason",)
        )
        self.usage_rows_lost = counter(
            "mlxd_usage_rows_lost", "Rows of usage given up: more than memory holds while storage was away."
        )
        self.usage_rows_pending = gauge("mlxd_usage_rows_pending", "Rows of usage that wait to be written.")

    def _declare_limits(self) -> None:
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        self.limits_refused = counter(
            "mlxd_limits_refused", "Requests refused for a limit of the principal or the address.", ("code",)
        )
        self.limits_shared_store_up = gauge(
            "mlxd_limits_shared_store_up", "1 while limits are counted in the shared store; 0 without one."
        )
        self.limits_reservations_swept = counter(
            "mlxd_limits_reservations_swept", "Reservations that nobody settled. None is normal."
        )
        self.reservations_open = gauge("mlxd_reservations_open", "Reservations of running requests.")

    def set_known(self, gauge: Gauge, value: float | None) -> None:
        """Set a gauge that not every installation has: exported from its first value on, NaN where that was lost."""
        with self._lock:
            if value is not None and gauge not in self._known:
                self._known.add(gauge)
                self.registry.register(gauge)
            gauge.set(math.nan if value is None else value)
