"""What is believed of the headers that name a caller's trace: https://www.w3.org/TR/trace-context/."""

import pytest
from hypothesis import given
from hypothesis.strategies import lists, text

from service.observability.trace_context import MAX_MEMBERS, MAX_STATE, TraceParent, trace_parent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (GIVEN, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f" \t{GIVEN}\t ", 1),
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", 1),
        (f"fe-{TRACE}-{SPAN}-01-", 1),
    ],
)
def test_a_well_formed_parent_is_taken(header: str, flags: int) -> None:
    assert trace_parent([header], []) == TraceParent(TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        TRACE,
        f"ff-{TRACE}-{SPAN}-01",
        f"FF-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01more",
        f"0-{TRACE}-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-01,{GIVEN}",
        f"00-{TRACE[:-1]}\u0664-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\x00",
    ],
)
def test_another_one_is_ignored(header: str) -> None:
    assert trace_parent([header], ["a=b"]) is None


def test_two_parents_are_none() -> None:
    assert trace_parent([], []) is None
    assert trace_parent([GIVEN, GIVEN], []) is None


@pytest.mark.parametrize(
    ("headers", "state"),
    [
        ([], ()),
        ([""], ()),
        (["congo=t61rcWkgMzE"], (("congo", "t61rcWkgMzE"),)),
        (["rojo=00f067aa0ba902b7,congo=t61"], (("rojo", "00f067aa0ba902b7"), ("congo", "t61"))),
        (["rojo=1", "congo=2"], (("rojo", "1"), ("congo", "2"))),
        ([" rojo=1 ,\t,, congo=2,"], (("rojo", "1"), ("congo", "2"))),
        (["fw529a3039@dt=FfAAAA", "a/b*c_d-e= x y"], (("fw529a3039@dt", "FfAAAA"), ("a/b*c_d-e", " x y"))),
        ([",".join(f"k{n}=1" for n in range(MAX_MEMBERS))], tuple((f"k{n}", "1") for n in range(MAX_MEMBERS))),
        ([",".join(f"k{n}=1" for n in range(MAX_MEMBERS + 1))], ()),
        (["a=1,a=2"], ()),
        (["a=1,B=2"], ()),
        (["a=1,b"], ()),
        (["a=1,b="], ()),
        (["a=1,b=c=d"], ()),
        (["a=1,b=\xe9"], ()),
        (["a=1,1a=2"], ()),
        (["a=1,a@@b=2"], ()),
        (["a=" + "x" * 256], (("a", "x" * 256),)),
        (["a=" + "x" * 257], ()),
        (["a=1,b=" + "x" * MAX_STATE], ()),
    ],
)
def test_the_state_is_taken_whole_or_not_at_all(headers: list[str], state: tuple[tuple[str, str], ...]) -> None:
    assert trace_parent([GIVEN], headers) == TraceParent(TRACE, SPAN, 1, state)


@given(lists(text(), max_size=2), lists(text(), max_size=2))
def test_no_text_is_an_error(traceparent: list[str], tracestate: list[str]) -> None:
    trace_parent(traceparent, tracestate)
    found = trace_parent([GIVEN], tracestate)
    assert found is not None
    assert found.trace_id == TRACE
