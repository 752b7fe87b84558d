"""Makes dashboards/mlxd.json of panels.toml: `python3 deploy/grafana/build.py`. Standard library only."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

HERE = Path(__file__).parent
DASHBOARD = HERE / "dashboards" / "mlxd.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'job="mlxd", instance=~"$instance"'
COLUMNS = 24
SIZES = {"stat": (3, 4), "timeseries": (8, 8), "table": (COLUMNS, 8)}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none"},
    "timeseries": {"tooltip": {"mode": "multi", "sort": "desc"}},
    "table": {},
}

Json = dict[str, Any]


def queries(panel: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of PromQL and legend."""
    if "quantiles" not in panel:
        return list(panel["queries"])
    labels, legend = (f"le, {panel['by']}", f" {{{{{panel['by']}}}}}") if "by" in panel else ("le", "")
    rate = f"sum by ({labels}) (rate({panel['quantiles']}[$__rate_interval]))"
    return [[f"histogram_quantile(0.{q}, {rate})", f"p{q}{legend}"] for q in ("50", "95", "99")]


def made(panel: Mapping[str, Any], number: int, place: Json) -> Json:
    """One panel as Grafana reads it."""
    kind = panel.get("kind", "timeseries")
    once = kind != "timeseries"
    targets = [
        {
            "refId": letter,
            "datasource": SOURCE,
            "expr": query.replace("@", SELECTED),
            "legendFormat": legend,
            "instant": once,
            "range": not once,
            "format": "table" if kind == "table" else "time_series",
        }
        for letter, (query, legend) in zip(ascii_uppercase, queries(panel), strict=False)
    ]
    return {
        "id": number,
        "type": kind,
        "title": panel["title"],
        "description": panel["help"],
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel["unit"]}, "overrides": []},
        "options": {**OPTIONS[kind], **panel.get("options", {})},
        "targets": targets,
    }


def laid_out(rows: list[Json]) -> Iterator[Json]:
    """The panels below the titles of their rows, from left to right."""
    number = y = 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row["title"], "collapsed": False, "panels": [], "gridPos": place}
        x, y, tallest = 0, y + 1, 0
        for panel in row["panel"]:
            width, height = SIZES[panel.get("kind", "timeseries")]
            width = panel.get("width", width)
            if x + width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield made(panel, number, {"x": x, "y": y, "w": width, "h": height})
            x, tallest = x + width, max(tallest, height)
        y += tallest


def variable(name: str, label: str, series: str) -> Json:
    """The values of a label, all chosen at first."""
    query = f"label_values({series.replace('@', SELECTED)}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> str:
    """The whole file."""
    rows = tomllib.loads((HERE / "panels.toml").read_text("utf-8"))["row"]
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    variables = [
        source,
        variable("instance", "Instance", 'up{job="mlxd"}'),
        variable("prompt_size", "Prompt size", "mlxd_time_to_first_token_seconds_count{@}"),
        variable("tenant", "Tenant", "mlxd_consumer_requests_total{@}"),
        variable("key_id", "Key", 'mlxd_consumer_requests_total{@, tenant=~"$tenant"}'),
    ]
    found = {
        "uid": "mlxd",
        "title": "mlxd",
        "tags": ["mlxd"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": list(laid_out(rows)),
    }
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
