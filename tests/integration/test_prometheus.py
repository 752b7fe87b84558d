"""The shipped rules and dashboard: complete, right by promtool, and full of data over a real service under load."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from service.settings import Settings
from tests.conftest import ROOT
from tests.prometheus_server import SHIPPED, Prometheus, prometheus_server, promtool, scraping, shipped_copy
from tests.serving import BRIEF_CHUNK, bearer, make_key, served
from tests.token_authority import key_set, rsa_jwk, rsa_key
from tests.unit.test_metrics import documented

GRAFANA = ROOT / "deploy" / "grafana"
STORIES = sorted((SHIPPED / "tests").glob("*.yml"))
RULES = [
    rule
    for path in sorted((SHIPPED / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
DASHBOARD = json.loads((GRAFANA / "dashboards" / "mlxd.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}

INTERVAL = "500ms"
PATIENCE = 60
"""Seconds for data to be there, on a machine that others use too; five are usual."""


def stories(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((SHIPPED / "tests" / name).read_text("utf-8"))["tests"])


def series_in(promql: str) -> set[str]:
    """Names of recorded series, of ours and of the process, and `up`."""
    return set(re.findall(r"\b(?:[a-z_]+:[a-z0-9_:]+|(?:mlxd|process)_[a-z0-9_]+|up\b)", promql))


def exported_names() -> set[str]:
    """Every name that a documented series has in the text format."""
    found = {"up"}
    for name, (kind, _) in documented().items():
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


# Without a service -------------------------------------------------------------------------------------------


def test_the_shipped_configuration_and_rules_are_valid(tmp_path: Path) -> None:
    said = promtool("check", "config", shipped_copy(tmp_path, "a key"))
    assert f"SUCCESS: {len(ALERTS)} rules found" in said
    assert f"SUCCESS: {len(RECORDED)} rules found" in said


@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent_and_rules_have_values_as_told(story: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", story)


def test_every_alert_fires_in_a_story_and_is_silent_in_the_healthy_one() -> None:
    said = [
        (test["alertname"], bool(test.get("exp_alerts")))
        for name in ("firing.yml", "firing_slowly.yml")
        for story in stories(name)
        for test in story["alert_rule_test"]
    ]
    assert {alert for alert, fires in said if fires} == set(ALERTS)
    healthy, *_ = stories("healthy.yml")
    assert {test["alertname"]: test.get("exp_alerts") for test in healthy["alert_rule_test"]} == dict.fromkeys(ALERTS)


def test_the_healthy_story_has_every_series_that_an_alert_reads() -> None:
    """An alert is not silent for want of data."""
    healthy, *_ = stories("healthy.yml")
    told = {series for given in healthy["input_series"] for series in series_in(given["series"])}
    read: set[str] = set()
    waiting = [rule["expr"] for rule in ALERTS.values()]
    while waiting:
        for name in series_in(str(waiting.pop())) - read:
            read.add(name)
            waiting += [RECORDED[name]["expr"]] if name in RECORDED else []
    assert read - set(RECORDED) == told


def test_every_recording_rule_has_an_expected_value() -> None:
    expected = {
        name
        for story in stories("recording.yml")
        for test in story["promql_expr_test"]
        for sample in test["exp_samples"]
        for name in series_in(sample["labels"])
    }
    assert expected == set(RECORDED)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_where_to_read_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
    assert anchor == alert.lower()
    assert headings.count(alert) == 1


def test_the_runbook_has_no_entry_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^#+ (Mlxd\w+)$", (ROOT / "docs/runbook.md").read_text("utf-8"), re.MULTILINE)) == set(
        ALERTS
    )


def test_rules_and_dashboard_read_only_series_that_there_are() -> None:
    known = exported_names() | set(RECORDED)
    queries = [*(str(rule["expr"]) for rule in RULES), *QUERIES.values(), *variables()]
    assert {name for query in queries for name in series_in(query)} - known == set()


def test_the_dashboard_is_what_its_panels_build() -> None:
    built = runpy.run_path(str(GRAFANA / "build.py"))["dashboard"]()
    assert (GRAFANA / "dashboards" / "mlxd.json").read_text("utf-8") == built


def test_every_panel_says_what_it_shows_and_asks_the_chosen_source() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


# With one ----------------------------------------------------------------------------------------------------


def variables() -> list[str]:
    """The series whose labels become the dashboard's variables, as queries that count their values."""
    found = [
        re.fullmatch(r"label_values\((.+), (\w+)\)", each["query"]) for each in DASHBOARD["templating"]["list"][1:]
    ]
    return [f"count by ({match[2]}) ({match[1]})" for match in found if match]


def filled(promql: str) -> str:
    """A query as Grafana sends it when everything is chosen."""
    values = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*", "$prompt_size": ".*"}
    for name, value in {**values, "$tenant": ".*", "$key_id": ".*"}.items():
        promql = promql.replace(name, value)
    assert "$" not in promql
    return promql


class Traffic:
    """Two tenants that are served, and once everything that is refused."""

    def __init__(self, settings: Settings) -> None:
        self.acme = bearer(make_key(settings, "inference", tenant="acme"))
        self.umbra = bearer(make_key(settings, "inference", tenant="umbra"))
        self.small = bearer(make_key(settings, "inference", limits={"max_output_tokens": 5}))

    def run(self, url: str, stop: threading.Event) -> None:
        asyncio.run(self._run(url, stop))

    async def _run(self, url: str, stop: threading.Event) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            await self._refusals(http)
            while not stop.is_set():
                await self._round(http)

    async def _round(self, http: httpx.AsyncClient) -> None:
        said = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "n": 2}
        asked = [
            http.post("/v1/chat/completions", json={"model": "default", **said}, headers=self.umbra),
            http.post("/generate", json={"prompt": "long " * 300, "max_tokens": 5}, headers=self.acme),
            http.post("/generate", json={"prompt": "short", "max_tokens": 30, "stream": True}, headers=self.acme),
        ]
        answers = await asyncio.gather(*asked, self._leaving(http))
        assert [answer.status_code for answer in answers if answer] == [200] * 3

    async def _leaving(self, http: httpx.AsyncClient) -> None:
        body = {"prompt": "tell me more", "max_tokens": 2000, "stream": True}
        async with http.stream("POST", "/generate", json=body, headers=self.umbra) as answer:
            async for _ in answer.aiter_bytes():
                return

    async def _refusals(self, http: httpx.AsyncClient) -> None:
        body: Mapping[str, Any] = {"prompt": "ab", "max_tokens": 10}
        rows = {"model": "default", "prompt": "ab", "n": 8}
        for status, answering in (
            (401, http.post("/generate", json=body)),
            (401, http.post("/generate", json=body, headers=bearer("mlxd_test_nobody"))),
            (404, http.post("/nowhere", json=body, headers=self.acme)),
            (400, http.post("/generate", json={**body, "max_tokens": -1}, headers=self.acme)),
            (400, http.post("/generate", json=body, headers=self.small)),
            (503, http.post("/v1/completions", json=rows, headers=self.acme)),
            (400, http.get("/health", headers={"host": ""})),
        ):
            answer = await answering
            assert answer.status_code == status, (answer.request.url, answer.text)


@pytest.fixture(scope="module")
def prometheus(tiny_long_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes the operator's listener of a service that is asked for as long as the tests last."""
    folder = tmp_path_factory.mktemp("scraped")
    (folder / "keys.json").write_bytes(key_set(rsa_jwk(rsa_key(), kid="r1")))
    issuer = {"name": "acme", "issuer": "https://acme.test/", "audience": "mlxd", "algorithms": ["RS256"]}
    settings = Settings.load(
        None,
        {
            "model.reference": str(tiny_long_model_dir),
            "server.state_dir": folder / "state",
            "server.port": 0,
            "auth.issuers": [{**issuer, "jwks_file": str(folder / "keys.json")}],
            "engine.max_rows": 4,
            "engine.max_prefill_chunk": BRIEF_CHUNK,
            "engine.max_queue": 3,  # with the rows fewer than 8: the refused request of `Traffic`
            "engine.memory_budget": 128 << 20,
            "limits.plans": {"default": {"requests_per_minute": 1_000_000, "request_burst": 1_000_000}},
        },
    )
    traffic, stop = Traffic(settings), threading.Event()
    config = shipped_copy(folder / "prometheus", make_key(settings, "metrics").text)
    with served(settings) as service, ThreadPoolExecutor(1) as thread:
        running = thread.submit(traffic.run, service.url, stop)
        try:
            with prometheus_server(scraping(config, httpx.URL(service.ops_url).netloc.decode(), INTERVAL)) as found:
                yield found
        finally:
            stop.set()
        running.result(PATIENCE)


def without_data(prometheus: Prometheus, queries: Mapping[str, str]) -> dict[str, str]:
    """What of `queries` has given no number until patience ended."""
    ends = time.monotonic() + PATIENCE
    missing = dict(queries)
    while missing and time.monotonic() < ends:
        missing = {name: query for name, query in missing.items() if not prometheus.query(query)}
        time.sleep(0.1 if missing else 0)
    return missing


def test_every_recording_rule_yields_data(prometheus: Prometheus) -> None:
    assert without_data(prometheus, {name: name for name in RECORDED}) == {}


def test_every_query_of_every_panel_yields_data(prometheus: Prometheus) -> None:
    assert without_data(prometheus, {name: filled(query) for name, query in QUERIES.items()}) == {}


def test_every_variable_has_values_to_choose_from(prometheus: Prometheus) -> None:
    assert without_data(prometheus, {query: filled(query) for query in variables()}) == {}
    assert len(prometheus.query("count by (tenant) (mlxd_consumer_requests_total)")) >= 2


def test_no_rule_fails_and_no_alert_fires_while_the_service_is_well(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {*ALERTS, *RECORDED}
    assert [rule["lastError"] for rule in loaded if rule["health"] == "err"] == []
    assert [alert["labels"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"] == []
    assert prometheus.query("min_over_time(up[5m])") == [1]
