import re
from pathlib import Path

from service.observability.metrics import Metrics

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"


def exported() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels of each series, by the name under which it is exported."""
    found = {}
    for attribute in vars(Metrics()).values():
        if not hasattr(attribute, "_labelnames"):
            continue
        [family] = attribute.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, tuple(attribute._labelnames))
    return found


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", TABLE.read_text("utf-8"), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_series_is_documented_and_nothing_else() -> None:
    assert exported() == documented()


def test_every_series_has_our_prefix() -> None:
    assert all(name.startswith("mlxd_") for name in exported())


def test_two_services_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.generation_tokens.inc(5)
    assert b"mlxd_generation_tokens_total 5.0" in one.render()
    assert b"mlxd_generation_tokens_total 0.0" in other.render()


def test_counters_have_no_second_series() -> None:
    assert b"_created" not in Metrics().render()
