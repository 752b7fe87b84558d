"""From the series to the text of a scrape, in Prometheus' format or OpenMetrics', which alone has exemplars."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

TEXT = CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS = CONTENT_TYPE_LATEST


def content_type(accept: str) -> str:
    """TEXT, or OPENMETRICS for a client that names it: Prometheus does, and prefers it.

    The client's version is not repeated to it, nor parsed: prometheus-client's own choice fails at one that is no
    number.
    """
    named = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return OPENMETRICS if "application/openmetrics-text" in named else TEXT


def render(series: Collector, form: str) -> bytes:
    """The exposition as TEXT or OPENMETRICS. Takes milliseconds: call it off the event loop."""
    if form == OPENMETRICS:
        return bytes(generate_openmetrics(series))  # type: ignore[no-untyped-call]
    return generate_latest(series)
