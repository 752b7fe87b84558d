"""vLLM's names for our series, so that dashboards made for vLLM show this service too. Nothing is counted twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

ALIASES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "request_success",
        "admission_rejections",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    }
)
"""Families that mean the same in vLLM, without prefix and suffix."""

KEPT_LABELS = frozenset({"finished_reason", "reason", "le"})
"""Labels that vLLM has too; over all others its series are sums."""


class WithAliases(Collector):
    """The series of a registry, and those of ALIASES once more as vLLM would name them for `model`. Any thread."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._labels = {"model_name": model, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        """Every family, each followed by its alias; exemplars stay with ours."""
        for family in self._registry.collect():
            yield family
            if family.name.removeprefix("mlxd_") in ALIASES:
                yield self._alias(family)

    def _alias(self, family: Metric) -> Metric:
        sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for sample in family.samples:
            kept = tuple(pair for pair in sample.labels.items() if pair[0] in KEPT_LABELS)
            sums[sample.name, kept] += sample.value
        alias = Metric(_vllm(family.name), family.documentation, family.type)
        for (name, kept), value in sums.items():
            alias.add_sample(_vllm(name), {**self._labels, **dict(kept)}, value)
        return alias


def _vllm(name: str) -> str:
    return "vllm:" + name.removeprefix("mlxd_")
