"""Plans: every number is checked when it is loaded, and nothing but the word says "unlimited"."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service.auth.principal import LOCAL, Principal
from service.settings import ConfigurationError, LimitsSettings, PlanError, PlanSettings, Settings, as_toml
from service.settings.plans import MAX_AMOUNT
from tests.conftest import ROOT

WHOLE = (
    "requests_per_minute",
    "request_burst",
    "tokens_per_minute",
    "concurrent_requests",
    "max_prompt_tokens",
    "max_output_tokens",
)
QUOTAS = ("daily_tokens", "monthly_tokens")
NOT_A_LIMIT: list[Any] = [
    *(0, -1, -0.5, 1.5, math.nan, math.inf, -math.inf, True, False, None, "", "none", "60/minute", "0", "-1"),
    *("unlimited ", "Unlimited", "inf", "1e3", [60], {"amount": 60}, 2**64),
]


@dataclass
class Someone:
    plan: str = "default"
    limits: Mapping[str, int] = field(default_factory=dict)


def load(plans: Mapping[str, Any], **other: Any) -> LimitsSettings:
    given = {"plans": plans, **other}
    return Settings.load(None, {f"limits.{key}": value for key, value in given.items()}).limits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in (*WHOLE, *QUOTAS, "weight")
        for value in NOT_A_LIMIT
        if (name, value) != ("weight", 1.5)
    ],
)
def test_what_is_no_positive_number_refuses_the_start(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({"gold": {name: value}})
    assert f"limits.plans.gold.{name}" in str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_only_quotas_can_be_unlimited_and_only_by_the_word(name: str) -> None:
    with pytest.raises(ConfigurationError):
        load({"gold": {name: "unlimited"}})
    for quota in QUOTAS:
        assert getattr(load({"gold": {quota: "unlimited"}}).plans["gold"], quota) == "unlimited"
        assert getattr(load({"gold": {quota: 5}}).plans["gold"], quota) == 5


@pytest.mark.parametrize("name", ["Gold", "", "a b", "gold\n", "x" * 33])
def test_a_plan_has_a_name_that_a_key_could_carry(name: str) -> None:
    with pytest.raises(ConfigurationError):
        load({name: {}})


@pytest.mark.parametrize("value", [*NOT_A_LIMIT, "unlimited"], ids=repr)
def test_failures_are_limited_too(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"limits\.failed_authentication_per_minute"):
        load({}, failed_authentication_per_minute=value)


@pytest.mark.parametrize(("name", "value"), [("redis_timeout", 0.2), ("redis_timeout", 0), ("redis_retry_interval", 0)])
def test_redis_is_never_waited_for_long(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load({}, **{name: value})


def test_an_unknown_number_refuses_the_start() -> None:
    with pytest.raises(ConfigurationError, match="unknown key"):
        load({"gold": {"request_per_minute": 5}})


def test_the_default_plan_is_always_there_and_can_be_changed() -> None:
    assert load({}).plans == {"default": PlanSettings()}
    assert load({"gold": {}}).plans.keys() == {"default", "gold"}
    assert load({"default": {"weight": 2}}).plans["default"].weight == 2


def test_a_plan_comes_from_a_file_and_single_numbers_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[limits.plans.gold]\nrequests_per_minute = 7\nrequest_burst = 3\n")
    assert Settings.load(path).limits.plans["gold"].requests_per_minute == 7
    monkeypatch.setenv("MLXD_LIMITS__PLANS__GOLD__REQUESTS_PER_MINUTE", "9")
    gold = Settings.load(path).limits.plans["gold"]
    assert (gold.requests_per_minute, gold.request_burst) == (9, 3)
    monkeypatch.setenv("MLXD_LIMITS__PLANS__GOLD__REQUESTS_PER_MINUTE", "0")
    with pytest.raises(ConfigurationError, match="requests_per_minute"):
        Settings.load(path)
    monkeypatch.delenv("MLXD_LIMITS__PLANS__GOLD__REQUESTS_PER_MINUTE")
    monkeypatch.setenv("MLXD_LIMITS__PLANS", json.dumps({"silver": {"weight": 0.5}}))
    assert Settings.load(path).limits.plans.keys() == {"default", "gold", "silver"}


def test_what_is_shown_can_be_read_back(tmp_path: Path) -> None:
    before = load({"gold": {"weight": 2.5, "daily_tokens": 100}})
    path = tmp_path / "shown.toml"
    path.write_text(as_toml({"limits.plans": before.model_dump(mode="json")["plans"]}))
    assert Settings.load(path).limits == before


def test_a_principal_has_its_plan_with_its_own_numbers() -> None:
    limits = load({"gold": {"requests_per_minute": 7, "weight": 2}})
    assert limits.for_principal(LOCAL) == PlanSettings()
    assert limits.for_principal(Someone("gold")) is limits.plans["gold"]
    own = limits.for_principal(Someone("gold", {"requests_per_minute": 70, "daily_tokens": 5}))
    assert (own.requests_per_minute, own.daily_tokens, own.weight) == (70, 5, 2)
    assert limits.plans["gold"].requests_per_minute == 7
    principal = Principal(id="key:a", tenant="t", scopes=frozenset(), plan="gold", limits={"concurrent_requests": 1})
    assert limits.for_principal(principal).concurrent_requests == 1


def test_an_unknown_plan_allows_nothing() -> None:
    with pytest.raises(PlanError) as caught:
        load({}).for_principal(Someone("gold"))
    assert caught.value.reason == "unknown_plan"


@pytest.mark.parametrize(
    "limits",
    [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"weight": 0}, {"nonsense": 5}, {"daily_tokens": 0},
     {"concurrent_requests": MAX_AMOUNT + 1}, {"concurrent_requests": True}],
    ids=repr,
)  # fmt: skip
def test_a_number_of_its_own_that_no_plan_could_have_allows_nothing(limits: dict[str, int]) -> None:
    with pytest.raises(PlanError) as caught:
        load({}).for_principal(Someone(limits=limits))
    assert caught.value.reason == "bad_override"
    assert next(iter(limits)) in str(caught.value)


@given(st.dictionaries(st.sampled_from([*WHOLE, *QUOTAS, "weight", "other"]), st.integers() | st.floats() | st.text()))
@pytest.mark.no_cover  # many turns of what others cover
def test_whatever_stands_at_a_key_its_limits_are_finite_and_positive_or_it_is_refused(given: dict[str, Any]) -> None:
    try:
        plan = LimitsSettings().for_principal(Someone(limits=given))
    except PlanError:
        return
    for name in WHOLE:
        assert 1 <= getattr(plan, name) <= MAX_AMOUNT
    assert 0 < plan.weight <= 100
    assert all(getattr(plan, name) == "unlimited" or getattr(plan, name) >= 1 for name in QUOTAS)


def test_the_documentation_has_every_number_of_a_plan() -> None:
    documented = (ROOT / "docs/limits.md").read_text("utf-8").splitlines()
    rows = [
        f"| `{name}` | `{json.dumps(value.default)}` | {value.description} |"
        for name, value in PlanSettings.model_fields.items()
    ]
    assert [row for row in rows if row not in documented] == []
