"""Text of short steps goes to the event loop together; nothing that somebody waits for is kept back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from service.engine import outbox
from service.engine.backend import Row, StepResult, nothing
from service.engine.engine import Engine, EngineState
from service.engine.generation import Delta, Generation, GenerationRequest
from service.engine.outbox import Delivery, When
from service.engine.telemetry import Telemetry
from service.errors import CredentialRevoked
from service.observability.metrics import Metrics
from service.settings import EngineSettings
from tests.fakes import FakeBackend, fake_tokenizer, letters
from tests.timed import ByHand, TimedBackend

BRIEF = 0.002
"""Seconds of a step, and one millisecond for each row."""


def pieces(hand: ByHand, generation: Generation) -> list[int]:
    """Characters, which are tokens, of each piece that was handed over."""
    return [len(delta.text) for delta in hand.said[generation]]


def test_short_steps_share_a_piece_but_for_the_first_token_and_the_end() -> None:
    hand = ByHand(TimedBackend(decode_base=BRIEF), delivery_interval=0.01)
    generation = hand.submit(max_tokens=20)
    hand.finish()
    assert pieces(hand, generation) == [1, 3, 3, 3, 3, 3, 3, 1], "nine milliseconds are nearer than twelve"
    assert hand.said[generation][-1].final


@pytest.mark.parametrize(("streams", "tokens"), [(1, 3), (16, 3), (24, 5), (32, 7), (64, 7)])
def test_the_more_streams_the_longer_the_interval_up_to_twice_as_long(streams: int, tokens: int) -> None:
    hand = ByHand(TimedBackend(decode_base=0.003, decode_row=0.0), delivery_interval=0.01, max_rows=64)
    generations = [hand.submit(max_tokens=200) for _ in range(streams)]
    hand.finish()
    assert {max(pieces(hand, generation)) for generation in generations} == {tokens}


@pytest.mark.parametrize(("step", "interval"), [(0.012, 0.01), (0.003, 0.0)])
def test_every_step_has_a_piece_of_its_own_where_it_takes_as_long_or_so_configured(
    step: float, interval: float
) -> None:
    hand = ByHand(TimedBackend(decode_base=step, decode_row=0.0), delivery_interval=interval)
    generation = hand.submit(max_tokens=6)
    hand.finish()
    assert pieces(hand, generation) == [1] * 6


class Overlapping(TimedBackend):
    """Its steps are waited for. Writes down how many characters had been said when each began, and when it waited."""

    def __init__(self) -> None:
        super().__init__(overlapping=True)
        self.hand = ByHand(self, delivery_interval=0.0)
        self.seen: list[tuple[int, int]] = []

    def step(self) -> StepResult:
        before = self._said()
        result = super().step()
        self.seen.append((before, self._said()))
        return result

    def _said(self) -> int:
        return sum(len(delta.text) for said in self.hand.said.values() for delta in said)


def test_where_steps_are_waited_for_text_is_handed_over_while_the_next_one_is() -> None:
    """But a first text and an end at once."""
    backend = Overlapping()
    generation = backend.hand.submit(max_tokens=6)
    backend.hand.finish()
    assert pieces(backend.hand, generation) == [1] * 6
    assert backend.seen == [(0, 0), (0, 0), (1, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert backend.hand.said[generation][-1].final


def test_what_is_left_for_the_next_step_is_handed_over_before_one_that_reads_a_prompt() -> None:
    backend = Overlapping()
    generation = backend.hand.submit("a", max_tokens=1000)
    backend.hand.turns_until(lambda: generation.meter.completion_tokens == 5)
    assert sum(pieces(backend.hand, generation)) == 4
    backend.hand.submit("b", prompt=600)
    backend.hand.turn()
    assert backend.seen[-1][0] == 5


def test_what_waits_goes_with_what_cannot() -> None:
    """Somebody else's first token, and somebody else's end."""
    hand = ByHand(TimedBackend(decode_base=BRIEF), delivery_interval=1.0)
    long = hand.submit("a", max_tokens=40)
    hand.turns_until(lambda: long.meter.completion_tokens == 3)
    assert pieces(hand, long) == [1]
    short = hand.submit("b", max_tokens=4)
    hand.turns_until(lambda: short.meter.completion_tokens == 1)
    assert sum(pieces(hand, long)) == long.meter.completion_tokens
    hand.turns_until(lambda: short.finished)
    assert pieces(hand, short) == [1, 3]
    assert sum(pieces(hand, long)) == long.meter.completion_tokens == 8


def test_a_first_text_does_not_wait_where_the_first_token_has_none() -> None:
    """A character of two tokens, beside a stream that has just had a piece."""
    half, rest = fake_tokenizer().encode("é")

    def script(row: Row, index: int) -> int:
        return (half, rest)[index] if index < 2 and len(row.prompt) == 7 else letters(row, index)

    hand = ByHand(TimedBackend(decode_base=BRIEF, script=script), delivery_interval=1.0)
    hand.submit("a", max_tokens=1000)
    hand.turn(5)
    second = hand.submit("b", prompt=7, max_tokens=1000)
    hand.turns_until(lambda: second.meter.completion_tokens == 1)
    assert second not in hand.said
    hand.turn()
    assert [delta.text for delta in hand.said[second]] == ["é"]


def test_nothing_waits_for_the_prompt_of_a_newcomer() -> None:
    class Watched(TimedBackend):
        def step(self) -> StepResult:
            if newcomer and not seen:
                seen.append(sum(pieces(hand, generation)))
            return super().step()

    newcomer: list[Generation] = []
    seen: list[int] = []
    hand = ByHand(Watched(decode_base=BRIEF), delivery_interval=1.0)
    generation = hand.submit("a", max_tokens=1000)
    hand.turns_until(lambda: generation.meter.completion_tokens == 5)
    assert sum(pieces(hand, generation)) == 1
    newcomer.append(hand.submit("b", prompt=600))
    hand.turn()
    assert seen == [5], "before the step that begins with its prompt"
    during = []
    while newcomer[0].meter.completion_tokens == 0:
        hand.turn()
        during.append(generation.meter.completion_tokens - sum(pieces(hand, generation)))
    assert during == [0] * len(during), "and not in those that go on with it"
    assert len(during) > 5


def test_nothing_is_kept_for_who_has_left() -> None:
    hand = ByHand(TimedBackend(decode_base=BRIEF), delivery_interval=1.0)
    generation = hand.submit(max_tokens=100)
    hand.turns_until(lambda: generation.meter.completion_tokens == 5)
    generation.close()
    hand.turn()
    said = sum(pieces(hand, generation))
    hand.worker._outbox.hand_over(When.NOW)
    assert sum(pieces(hand, generation)) == said


def test_an_error_takes_along_what_was_said_before_it() -> None:
    hand = ByHand(TimedBackend(decode_base=BRIEF), delivery_interval=1.0)
    generation = hand.submit(max_tokens=100)
    hand.turns_until(lambda: generation.meter.completion_tokens == 5)
    hand.worker.abort_running(CredentialRevoked("revoked"))
    hand.turn()
    assert pieces(hand, generation) == [1, 4]
    assert hand.said[generation][-1].error is not None


def test_the_loop_is_waited_for_with_a_first_text_alone_and_not_for_long() -> None:
    """Nor where there are many: each of these begins beside those before it, and all have text after every step."""
    hand = ByHand(TimedBackend(decode_base=BRIEF), delivery_interval=0.0)
    waits: list[tuple[int, bool]] = []

    def lost(batch: Sequence[Delivery], heard: Callable[[], object]) -> None:
        """The loop is busy, or has ended. How many have text, and whether the loop would be waited for."""
        waits.append((len(batch), heard is not nothing))

    hand.worker._outbox._deliver = lost
    hand.submit(max_tokens=4)
    hand.finish()
    assert waits == [(1, True), (1, False), (1, False), (1, False)]
    waits.clear()
    hand.submit_rows(outbox.ALONE + 2, max_tokens=20)
    hand.finish()
    assert [streams for streams, waited in waits if waited] == list(range(1, outbox.ALONE + 1))
    assert max(streams for streams, _ in waits) == outbox.ALONE + 2


async def test_the_next_step_begins_when_the_loop_has_a_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would keep the interpreter from the loop: 0.6 ms for a tiny model on two cores."""
    monkeypatch.setattr(outbox, "HEARD", 60.0)  # however busy the machine is
    backend = Watching()
    engine = Engine(backend, EngineSettings(), telemetry=Telemetry(Metrics()))
    await engine.start()
    await engine.wait(EngineState.READY)
    put = Generation.put

    def heard(generation: Generation, delta: Delta) -> None:
        backend.texts += 1
        put(generation, delta)

    monkeypatch.setattr(Generation, "put", heard)
    for times in range(1, 21):
        backend.texts, backend.seen = 0, []
        (generation,) = engine.submit([GenerationRequest(request_id="r", prompt=(5, 6), max_tokens=3)])
        async with asyncio.timeout(60):
            while not (await generation.read()).final:
                pass
        generation.close()
        first = next(at for at, (told, _) in enumerate(backend.seen) if told)
        assert backend.seen[first + 1][1] >= 1, f"the {times}th time"
    await engine.stop()


class Watching(FakeBackend):
    """Writes down of each step how many tokens it made, and how many texts the loop had before."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = 0
        self.seen: list[tuple[int, int]] = []

    def step(self) -> StepResult:
        texts = self.texts
        result = super().step()
        self.seen.append((len(result.tokens), texts))
        return result
