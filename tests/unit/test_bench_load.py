"""What is asked and when: conversations from a seed, streams that go on, arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, cast

import pytest

from service.bench import load as load_module
from service.bench.client import Api, Client, Outcome, Target
from service.bench.load import MOST_PATIENCE, PAUSE, Arrivals, Limit, Load, Run, poisson
from service.bench.series import EACH, Series
from service.bench.workload import Lengths, Mix, Workload
from tests.scripted_server import DONE, END, STREAM_HEAD, Send, chunk, plain, playing, said, usage

# Workloads ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_the_same_whenever_it_is_made_and_different_for_each_number_and_seed() -> None:
    work = Workload(prompt=Lengths(5, 50), output=Lengths(1, 9), mix=Mix.MIXED, turns=3, shared_prefix=4)
    assert work.conversation(7) == replace(work).conversation(7)
    made = [work.conversation(number).turns for number in range(50)]
    assert len(set(map(str, made))) == 50
    assert work.conversation(7).turns != replace(work, seed=1).conversation(7).turns


def test_prompts_have_so_many_words_and_outputs_so_many_tokens() -> None:
    turns = [
        Workload(prompt=Lengths(12, 12), output=Lengths(34, 34)).conversation(number).turns[0] for number in range(20)
    ]
    assert {len(str(turn.prompt).split()) for turn in turns} == {12}
    assert {turn.max_tokens for turn in turns} == {34}


def test_mixed_lengths_lie_between_their_bounds_with_as_many_in_each_doubling() -> None:
    rng = random.Random(1)
    drawn = [Lengths(32, 511).draw(rng) for _ in range(8000)]
    assert (min(drawn), max(drawn)) == (32, 511)
    doublings = Counter(value.bit_length() for value in drawn)
    assert all(abs(count / 2000 - 1) < 0.1 for count in doublings.values())
    assert len(doublings) == 4


@pytest.mark.parametrize(("text", "least", "most"), [("128", 128, 128), ("32:512", 32, 512), (" 7 ", 7, 7)])
def test_lengths_are_read_from_text(text: str, least: int, most: int) -> None:
    assert Lengths.parse(text) == Lengths(least, most)
    assert Lengths.parse(str(Lengths(least, most))) == Lengths(least, most)


@pytest.mark.parametrize("text", ["", "x", "0", "5:4", "-1", "1:2:3", "1.5", "0:5"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="LEAST"):
        Lengths.parse(text)


def test_a_shared_prefix_is_the_first_thing_that_all_say() -> None:
    work = Workload(shared_prefix=30, prompt=Lengths(5, 5))
    systems = {str(work.conversation(number).system) for number in range(5)}
    assert [len(system.split()) for system in systems] == [30]
    body = work.body(work.conversation(0), [], api=Api.CHAT, model="m")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] in systems
    prompt = work.body(work.conversation(0), [], api=Api.COMPLETIONS, model="m")["prompt"]
    assert prompt.startswith(next(iter(systems)))


def test_each_turn_carries_all_that_was_said_before_it() -> None:
    work = Workload(turns=3, prompt=Lengths(2, 2))
    talk = work.conversation(0)
    said = [str(turn.prompt) for turn in talk.turns]
    body = work.body(talk, ["first", "second"], api=Api.CHAT, model="m")
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("user", said[0]),
        ("assistant", "first"),
        ("user", said[1]),
        ("assistant", "second"),
        ("user", said[2]),
    ]
    text = work.body(talk, ["first"], api=Api.COMPLETIONS, model="m")["prompt"]
    assert text == f"{said[0]}\nfirst\n{said[1]}"


def test_prompts_of_token_ids_are_ids_the_prefix_first() -> None:
    work = Workload(ids=(3, 9), prompt=Lengths(40, 40), shared_prefix=10)
    first, second = (
        work.body(work.conversation(number), [], api=Api.COMPLETIONS, model="m")["prompt"] for number in (0, 1)
    )
    assert first[:10] == second[:10]
    assert first[10:] != second[10:]
    assert len(first) == 50
    assert set(first) <= set(range(3, 10))


def test_conversations_of_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="words"):
        Workload(ids=(3, 9), turns=2)


def test_greedy_is_temperature_0_and_mixed_gives_every_request_parameters_of_its_own() -> None:
    greedy = Workload().conversation(0).turns[0].sampling
    assert dict(greedy) == {"temperature": 0}
    mixed = [dict(Workload(mix=Mix.MIXED).conversation(number).turns[0].sampling) for number in range(200)]
    assert all(len({params[name] for params in mixed}) > 50 for name in mixed[0])
    assert set(mixed[0]) == {"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"}


def test_given_fields_are_stronger_than_ours_and_null_takes_one_out() -> None:
    work = Workload(extra={"seed": None, "max_tokens": 3, "ignore_eos": True}, mix=Mix.MIXED)
    body = work.body(work.conversation(0), [], api=Api.CHAT, model="m")
    assert "seed" not in body
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (3, True, True)


# Arrivals ----------------------------------------------------------------------------------------------------


def test_arrivals_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert list(islice(poisson(5, 1), 100)) == list(islice(poisson(5, 1), 100))
    assert list(islice(poisson(5, 1), 100)) != list(islice(poisson(5, 2), 100))


def test_the_times_between_arrivals_are_exponential() -> None:
    """Kolmogorov-Smirnov at the 0.1 % level: a right generator with another seed would fail once in a thousand."""
    rate, number = 7.0, 20_000
    gaps = sorted(later - earlier for earlier, later in pairwise([0.0, *islice(poisson(rate, 3), number)]))
    assert statistics.fmean(gaps) == pytest.approx(1 / rate, rel=0.03)
    expected = [1 - math.exp(-rate * gap) for gap in gaps]
    distance = max(max((n + 1) / number - e, e - n / number) for n, e in enumerate(expected))
    assert distance < 1.95 / math.sqrt(number)


def test_arrivals_in_a_second_scatter_as_poisson_says() -> None:
    """The variance of the counts is their mean; a regular clock's would be 0, a burst's several times it."""
    seconds = Counter(int(at) for at in islice(poisson(20, 4), 40_000))
    counts = [seconds[second] for second in range(1900)]
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1, abs=0.15)


# Loads -------------------------------------------------------------------------------------------------------


class Timeline:
    """A clock that is moved by who sleeps."""

    def __init__(self) -> None:
        self.now = 50.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Asked:
    """Instead of a client: answers when it is let, and remembers."""

    def __init__(self, clock: Timeline, *, error: str | None = None, retry_after: float | None = None) -> None:
        self.clock = clock
        self.bodies: list[Mapping[str, Any]] = []
        self.dues: list[float | None] = []
        self.open = self.most_open = 0
        self.let = asyncio.Event()
        self.error, self.retry_after = error, retry_after

    async def ask(self, body: Mapping[str, Any], *, due: float | None = None, keep_text: bool = False) -> Outcome:
        self.bodies.append(body)
        self.dues.append(due)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        sent = self.clock()
        await self.let.wait()
        self.open -= 1
        text = f"answer\0 {len(self.bodies)}" if keep_text else ""
        return Outcome(
            due=sent if due is None else due,
            sent=sent,
            ended=self.clock(),
            error=self.error,
            retry_after=self.retry_after,
            text=text,
        )


def loading(asked: Asked, workload: Workload | None = None) -> Load:
    clock = asked.clock
    work = workload or Workload(prompt=Lengths(3, 3))
    return Load(cast("Client", asked), work, api=Api.CHAT, model="m", clock=clock, sleep=clock.sleep)


async def test_a_closed_loop_keeps_so_many_going_until_all_were_had() -> None:
    asked = Asked(Timeline())
    running = asyncio.create_task(loading(asked).put(Arrivals(streams=4), Limit(conversations=30)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked.open == 4
    asked.let.set()
    run = await running
    assert (len(run.outcomes), asked.most_open) == (30, 4)
    assert len({str(body["messages"]) for body in asked.bodies}) == 30, "no prompt twice"
    assert asked.dues == [None] * 30


async def test_loads_one_after_the_other_ask_nothing_twice() -> None:
    asked = Asked(Timeline())
    asked.let.set()
    load = loading(asked)
    for _ in range(3):
        await load.put(Arrivals(streams=2), Limit(conversations=5))
    assert len({str(body["messages"]) for body in asked.bodies}) == 15


async def test_a_closed_loop_ends_after_its_seconds_and_finishes_what_runs() -> None:
    clock = Timeline()
    asked = Asked(clock)
    asked.let.set()

    def later(_: Outcome) -> None:
        clock.now += 1

    run = await loading(asked).put(Arrivals(streams=1), Limit(seconds=10), later)
    assert len(run.outcomes) == 10
    assert run.ended - run.began == 10


@pytest.mark.parametrize(("told", "slept"), [(None, PAUSE), (3.0, 3.0), (600.0, MOST_PATIENCE), (0.0, 0.0)])
async def test_a_refused_stream_waits_as_it_is_told_within_patience(told: float | None, slept: float) -> None:
    asked = Asked(Timeline(), error="429 rate_limit_requests", retry_after=told)
    asked.let.set()
    await loading(asked).put(Arrivals(streams=1), Limit(conversations=3))
    assert asked.clock.slept == [slept] * 3


async def test_an_open_loop_asks_when_it_is_due_whatever_has_become_of_the_others() -> None:
    asked = Asked(Timeline())
    began, offsets = asked.clock.now, list(islice(poisson(2, 0), 12))
    running = asyncio.create_task(loading(asked).put(Arrivals(rate=2), Limit(conversations=12)))
    while len(asked.bodies) < 12:
        await asyncio.sleep(0)
    assert asked.open == 12, "nobody has been answered"
    assert asked.dues == pytest.approx([began + offset for offset in offsets])
    asked.let.set()
    assert len((await running).outcomes) == 12


async def test_an_open_loop_ends_after_its_seconds() -> None:
    asked = Asked(Timeline())
    asked.let.set()
    run = await loading(asked).put(Arrivals(rate=5), Limit(seconds=20))
    expected = sum(1 for at in islice(poisson(5, 0), 1000) if at < 20)
    assert len(run.outcomes) == expected


async def test_latencies_of_an_open_loop_count_from_when_a_request_was_due_also_when_the_client_is_late() -> None:
    clock = Timeline()
    asked = Asked(clock)
    asked.let.set()
    load = loading(asked)

    async def slow(seconds: float) -> None:
        clock.now += seconds + 4
        await asyncio.sleep(0)

    load._sleep = slow
    run = await load.put(Arrivals(rate=1), Limit(conversations=1))
    assert run.outcomes[0].sent - run.outcomes[0].due == pytest.approx(4)
    assert run.outcomes[0].end_to_end == pytest.approx(4)


async def test_an_open_loop_is_bounded_and_says_what_it_did_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "MOST_OPEN", 3)
    asked = Asked(Timeline())
    seen: list[Outcome] = []
    running = asyncio.create_task(loading(asked).put(Arrivals(rate=2), Limit(conversations=5), seen.append))
    while len(seen) < 2:
        await asyncio.sleep(0)
    assert asked.open == 3
    asked.let.set()
    errors = Counter(outcome.error for outcome in (await running).outcomes)
    assert errors == {"not sent": 2, None: 3}


async def test_a_conversation_goes_on_with_what_was_answered_and_ends_with_a_failure() -> None:
    asked = Asked(Timeline())
    asked.let.set()
    work = Workload(turns=3, prompt=Lengths(2, 2))
    run = await loading(asked, work).put(Arrivals(streams=1), Limit(conversations=2))
    assert len(run.outcomes) == 6
    assert [len(body["messages"]) for body in asked.bodies] == [1, 3, 5, 1, 3, 5]
    assert asked.bodies[2]["messages"][3]["content"] == "answer 2"
    failing = Asked(Timeline(), error="cut")
    failing.let.set()
    run = await loading(failing, work).put(Arrivals(streams=1), Limit(conversations=2))
    assert len(run.outcomes) == 2


@pytest.mark.parametrize(
    ("series", "arrivals", "limit"),
    [
        (Series(arrivals=()), Arrivals(streams=4), Limit(conversations=4 * EACH)),
        (Series(arrivals=()), Arrivals(rate=0.01), Limit(conversations=1)),
        (Series(arrivals=(), conversations=5), Arrivals(streams=4), Limit(conversations=5)),
        (Series(arrivals=(), seconds=5.0), Arrivals(rate=4), Limit(seconds=5.0)),
        (Series(arrivals=(), seconds=5.0, conversations=9), Arrivals(rate=4), Limit(conversations=9, seconds=5.0)),
    ],
)
def test_how_long_a_load_goes_on(series: Series, arrivals: Arrivals, limit: Limit) -> None:
    assert series.limit(arrivals) == limit


async def test_a_load_over_sockets_is_what_the_server_saw() -> None:
    good = [Send(0, STREAM_HEAD + chunk(said("a") + said("b") + usage(2) + DONE) + END)]
    refusal = [Send(0, plain("503 Service Unavailable", b'{"error": {"code": "queue_full"}}', "Retry-After: 0"))]
    async with playing(*[good] * 5, refusal, good) as scripted:
        client = Client(Target(url=scripted.url), clock=scripted.clock)
        load = Load(client, Workload(), api=Api.CHAT, model="their-name", clock=scripted.clock)
        run: Run = await load.put(Arrivals(streams=1), Limit(conversations=20))
        client.close()
    assert Counter(outcome.error for outcome in run.outcomes) == {None: 19, "503 queue_full": 1}
    assert {request["model"] for request in scripted.requests} == {"their-name"}
    assert len(scripted.requests) == 20
