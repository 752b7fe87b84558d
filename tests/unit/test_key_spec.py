"""What may be said of a key: refused or stored as given."""

from __future__ import annotations

from typing import Any

import pytest

from service.auth.key_spec import LAST_TIME, KeySpec, check_period, checked
from service.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("name", "Ünïcode [b] 'x'", "Ünïcode [b] 'x'"),
        ("name", "n" * 64, "n" * 64),
        ("scopes", ["inference", "admin", "inference"], {"inference", "admin"}),
        ("plan", "gold-2", "gold-2"),
        ("tenant", None, None),
        ("tenant", "Acme.eu_west-1", "Acme.eu_west-1"),
        ("models", None, None),
        ("models", ["mlx-community/Llama 3"], {"mlx-community/Llama 3"}),
        ("networks", None, None),
        ("networks", ["192.0.2.7", "10.0.0.0/8", "10.0.0.0/8"], ("10.0.0.0/8", "192.0.2.7/32")),
        ("networks", ["2001:DB8:0::/32"], ("2001:db8::/32",)),
        ("networks", ["::ffff:192.0.2.0/120"], ("192.0.2.0/24",)),
        ("networks", ["::/0"], ("::/0",)),
        ("limits", {}, {}),
        ("limits", {"requests_per_minute": 0}, {"requests_per_minute": 0}),
        ("not_before", None, None),
        ("not_before", 0, 0.0),
        ("expires_at", LAST_TIME, LAST_TIME),
    ],
)
def test_what_is_stored_is_what_was_meant(field: str, value: Any, stored: Any) -> None:
    assert checked(**{field: value}) == {field: stored}


REFUSED: dict[str, tuple[Any, ...]] = {
    "name": (None, 7, "", " ", " a", "a ", "n" * 65, "a\nb", "a\x1b[31m", "a\0", "a\u202eb"),
    "scopes": (None, "inference", [], ["root"], ["Inference"], [7], ["models"] * 6, {}),
    "plan": (None, "", "Gold", "a" * 33, "a\n", "a/b", "é"),
    "tenant": (7, "", "a:b", "a/b", "issuer/acme", "key:abc", "local", "-a", "a" * 65, "a\n", "é"),
    "models": ([], "m", [""], ["m" * 257], ["m\n"], ["m"] * 65, [None]),
    "networks": ([], "10.0.0.0/8", ["10.0.0.1/8"], ["x"], ["10.0.0.0/33"], [""], [7], ["::"] * 65),
    "limits": (
        None,
        [],
        {"A": 1},
        {"a": -1},
        {"a": True},
        {"a": 1.5},
        {"a": 2**53 + 1},
        {7: 1},
        dict.fromkeys("abcdefghijklmnopq", 1),
    ),
    "not_before": (True, "1", -1, 1e300, float("nan")),
    "expires_at": (True, "1", -1, 1e300, float("inf")),
    "kid": ("abc",),
    "principal": ("key:abc",),
}


@pytest.mark.parametrize(("field", "value"), [(field, bad) for field, several in REFUSED.items() for bad in several])
def test_everything_else_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(**{field: value})
    assert caught.value.param == field


def test_a_key_needs_a_name_and_scopes() -> None:
    assert KeySpec.of(name="a", scopes=["models"]).plan == "default"
    for given, missing in (({"name": "a"}, "scopes"), ({"scopes": ["models"]}, "name")):
        with pytest.raises(InvalidRequest) as caught:
            KeySpec.of(**given)
        assert caught.value.param == missing


@pytest.mark.parametrize(
    ("not_before", "expires_at", "usable"),
    [
        (None, None, True),
        (None, 101.0, True),
        (None, 100.0, False),
        (50.0, None, True),
        (200.0, 201.0, True),
        (200.0, 200.0, False),
        (200.0, 150.0, False),
    ],
)
def test_a_key_that_could_never_be_used_is_refused(
    not_before: float | None, expires_at: float | None, *, usable: bool
) -> None:
    if usable:
        check_period(not_before, expires_at, 100.0)
    else:
        with pytest.raises(InvalidRequest):
            check_period(not_before, expires_at, 100.0)
