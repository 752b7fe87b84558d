import math
import os
import re
from pathlib import Path

import psutil
import pytest
from prometheus_client import Gauge, Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_families
from prometheus_client.registry import Collector

from service.observability import metrics as declared
from service.observability.aliases import ALIASES, WithAliases
from service.observability.exposition import OPENMETRICS, TEXT, content_type, render
from service.observability.metrics import Metrics


def openmetrics_families(text: str) -> list[Metric]:
    return list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,*/*;q=0.2"
)
"""The Accept header of Prometheus 3."""


def collectors(metrics: Metrics) -> set[Collector]:
    return set(metrics.registry._collector_to_names)


def exported() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels of each series, by the name under which it is exported."""
    metrics = Metrics()
    for gauge in {each for each in vars(metrics).values() if isinstance(each, Gauge)} - collectors(metrics):
        metrics.set_known(gauge, 0)
    found = {}
    for collector in collectors(metrics):
        for family in collector.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, tuple(getattr(collector, "_labelnames", ())))
    return found


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", TABLE.read_text("utf-8"), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_series_is_documented_and_nothing_else() -> None:
    assert exported() == documented()


def test_every_series_has_our_prefix_or_is_the_process_s_own() -> None:
    assert all(name.startswith(("mlxd_", "process_")) for name in exported())


def test_two_services_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.generation_tokens.inc(5)
    assert b"mlxd_generation_tokens_total 5.0" in render(one.registry, TEXT)
    assert b"mlxd_generation_tokens_total 0.0" in render(other.registry, TEXT)


@pytest.mark.parametrize("form", [TEXT, OPENMETRICS])
def test_counters_have_no_second_series(form: str) -> None:
    assert b"_created" not in render(Metrics().registry, form)


@pytest.mark.parametrize(
    "name", [name for name in vars(declared) if name.isupper() and isinstance(getattr(declared, name), tuple)]
)
def test_buckets_grow(name: str) -> None:
    buckets = getattr(declared, name)
    assert list(buckets) == sorted(set(buckets))


def test_prompts_and_outputs_are_counted_in_the_1_2_5_series() -> None:
    assert declared.TOKENS[:7] == (1, 2, 5, 10, 20, 50, 100)
    assert declared.TOKENS[-1] == 200_000


# What not every installation has ------------------------------------------------------------------------------


def test_what_nobody_knows_is_not_exported() -> None:
    metrics = Metrics()
    metrics.set_known(metrics.state_disk_free, None)
    assert metrics.registry.get_sample_value("mlxd_state_disk_free_bytes") is None
    metrics.set_known(metrics.state_disk_free, 7)
    metrics.set_known(metrics.state_disk_free, 8)
    assert metrics.registry.get_sample_value("mlxd_state_disk_free_bytes") == 8
    metrics.set_known(metrics.state_disk_free, None)
    lost = metrics.registry.get_sample_value("mlxd_state_disk_free_bytes")
    assert lost is not None
    assert math.isnan(lost)


def test_the_process_is_described_as_the_system_does_it() -> None:
    registry, process = Metrics().registry, psutil.Process()
    with Path(os.devnull).open() as _:
        files = registry.get_sample_value("process_open_fds")
    assert files == process.num_fds() + 1
    limit = registry.get_sample_value("process_max_fds")
    assert limit is not None
    assert limit > files
    assert registry.get_sample_value("process_start_time_seconds") == process.create_time()
    resident = registry.get_sample_value("process_resident_memory_bytes")
    assert resident == pytest.approx(process.memory_info().rss, rel=0.5)
    seconds = registry.get_sample_value("process_cpu_seconds_total")
    assert seconds is not None
    assert 0 < seconds <= sum(process.cpu_times()[:2])


# The two forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("Application/OpenMetrics-Text ; version=1.0.0", OPENMETRICS),
        ("application/openmetrics-text;version=no number", OPENMETRICS),
        ("text/html,application/openmetrics-text-not", TEXT),
        (PROMETHEUS, OPENMETRICS),
    ],
)
def test_a_client_gets_the_form_that_it_names(accept: str, form: str) -> None:
    assert content_type(accept) == form


def test_only_openmetrics_has_exemplars() -> None:
    metrics = Metrics()
    metrics.queue_time.observe(0.4, {"trace_id": "abc"})
    families = openmetrics_families(render(metrics.registry, OPENMETRICS).decode())
    [queue] = [family for family in families if family.name == "mlxd_request_queue_time_seconds"]
    [exemplar] = [sample.exemplar for sample in queue.samples if sample.exemplar is not None]
    assert (exemplar.labels, exemplar.value) == ({"trace_id": "abc"}, 0.4)
    assert b"trace_id" not in render(metrics.registry, TEXT)


def test_both_forms_say_the_same() -> None:
    metrics = Metrics()
    metrics.http_requests.labels("/generate", "POST", "200").inc(3)
    metrics.step_rows.observe(4)
    text = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_families(render(metrics.registry, TEXT).decode())
        for sample in family.samples
        if family.name.startswith("mlxd_")
    }
    openmetrics = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in openmetrics_families(render(metrics.registry, OPENMETRICS).decode())
        for sample in family.samples
        if family.name.startswith("mlxd_")
    }
    assert text == openmetrics
    assert text["mlxd_http_requests_total", ("method", "POST"), ("route", "/generate"), ("status", "200")] == 3


# vLLM's names ---------------------------------------------------------------------------------------------------


def aliased(metrics: Metrics, name: str, **labels: str) -> float | None:
    labels = {"model_name": "org/model", "engine": "0", **labels}
    series = WithAliases(metrics.registry, "org/model")
    for family in text_families(render(series, TEXT).decode()):
        for sample in family.samples:
            if (sample.name, sample.labels) == (f"vllm:{name}", labels):
                return float(sample.value)
    return None


def test_every_alias_is_a_series_of_ours_and_of_its_kind() -> None:
    metrics = Metrics()
    families = list(WithAliases(metrics.registry, "m").collect())
    ours = {family.name.removeprefix("mlxd_"): family.type for family in families if family.name.startswith("mlxd_")}
    theirs = {family.name.removeprefix("vllm:"): family.type for family in families if family.name.startswith("vllm:")}
    assert theirs.keys() == ALIASES
    assert theirs == {name: ours[name] for name in ALIASES}


def test_an_alias_is_the_sum_over_labels_that_vllm_has_not() -> None:
    metrics = Metrics()
    metrics.time_to_first_token.labels("0-1k").observe(0.3, {"trace_id": "abc"})
    metrics.time_to_first_token.labels("64k+").observe(100)
    assert aliased(metrics, "time_to_first_token_seconds_count") == 2
    assert aliased(metrics, "time_to_first_token_seconds_sum") == pytest.approx(100.3)
    assert aliased(metrics, "time_to_first_token_seconds_bucket", le="0.5") == 1
    assert aliased(metrics, "time_to_first_token_seconds_bucket", le="+Inf") == 2


def test_an_alias_keeps_the_labels_that_vllm_has() -> None:
    metrics = Metrics()
    metrics.request_success.labels("stop").inc(2)
    metrics.request_success.labels("length").inc(3)
    metrics.requests_running.set(4)
    assert aliased(metrics, "request_success_total", finished_reason="stop") == 2
    assert aliased(metrics, "request_success_total", finished_reason="length") == 3
    assert aliased(metrics, "num_requests_running") == 4


def test_aliases_are_valid_openmetrics_too() -> None:
    metrics = Metrics()
    metrics.queue_time.observe(0.4, {"trace_id": "abc"})
    text = render(WithAliases(metrics.registry, 'a "model"\n'), OPENMETRICS).decode()
    found = {family.name for family in openmetrics_families(text)}
    assert {f"vllm:{name}" for name in ALIASES} <= found
