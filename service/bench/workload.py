"""What is asked: conversations made from a seed, the same for every server and for the raw engine.

Prompts are of words, which every server takes, or of token ids, which `/v1/completions` of some take. Pure.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from service.bench.client import Api

WORDS = tuple(
    "able air animal answer apple arm autumn bag bank base bear bell bird boat body book bottle box branch bread "  # noqa: SIM905
    "bridge brother bus cake camp card cat chair child circle city clay clock cloud coat coffee colour corner country "
    "cow cup dance day desk dinner dog door dream drop ear earth east egg engine evening eye face farm father field "
    "finger fire fish flag floor flower foot forest fork friend fruit garden gate girl glass goat gold grain grass "
    "green ground hair hall hammer hand harbour hat head heart hill home honey horse hour house ice ink iron island "
    "jar journey juice key king kitchen knee knife lake lamp land leaf leg letter light line lion list lunch machine "
    "map market meal metal milk mind mirror money moon morning mother mountain mouse music nail name needle nest "
    "night north nose note number oak ocean oil onion orange oven page paint paper park path pen people piano picture "
    "piece plant plate pocket poem point queen question rain ring river road rock roof room root rope rose salt sand "
    "school sea season seat seed shadow sheep ship shoe shop shoulder silver sister sky sleep smile snow soap song "
    "soup south spoon spring square star station stone storm story street sugar summer sun table tail tea tent thumb "
    "ticket tiger time tomorrow tooth tower town train tree truck uncle valley village voice wall watch water wave "
    "week west wheel wind window wine wing winter wood wool word work year yellow zoo".split()
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long: always the same, or between two bounds with as many in each doubling (log-uniform)."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`128` or `32:512`. Raises ValueError."""
        found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text.strip())
        if found is None:
            raise ValueError(f"{text!r} is neither a number nor LEAST:MOST")
        least, most = int(found[1]), int(found[2] or found[1])
        if not 0 < least <= most:
            raise ValueError(f"{text!r} is not 0 < LEAST <= MOST")
        return cls(least, most)

    def draw(self, rng: random.Random) -> int:
        if self.least == self.most:
            return self.least
        return min(self.most, int(math.exp(rng.uniform(math.log(self.least), math.log(self.most + 1)))))

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


class Mix(StrEnum):
    """How tokens are drawn."""

    GREEDY = "greedy"
    """The likeliest one, always."""
    MIXED = "mixed"
    """Each request with a temperature, a top_p, a seed and penalties of its own."""


GREEDY = MappingProxyType({"temperature": 0})

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a user says, and how much may be answered."""

    prompt: Prompt
    max_tokens: int
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that follow one another, each with all that was said before. `system` is said first, by all alike."""

    system: Prompt | None
    turns: tuple[Turn, ...]

    def messages(self, answers: Sequence[str]) -> list[dict[str, str]]:
        """The chat up to the turn after `answers`. Of words only."""
        said = [] if self.system is None else [{"role": "system", "content": str(self.system)}]
        for turn, answer in zip(self.turns, answers, strict=False):
            said.append({"role": "user", "content": str(turn.prompt)})
            said.append({"role": "assistant", "content": answer})
        said.append({"role": "user", "content": str(self.turns[len(answers)].prompt)})
        return said

    def prompt(self, answers: Sequence[str]) -> str | list[int]:
        """The same as one prompt: lines of words, or token ids."""
        turn = self.turns[len(answers)]
        if isinstance(turn.prompt, tuple):
            return [*(self.system or ()), *turn.prompt]
        return "\n".join(message["content"] for message in self.messages(answers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Where conversations come from. `prompt` and `shared_prefix` are in words, or with `ids` (least, most) in tokens.

    Conversation `number` is the same whenever and wherever it is made from the same workload.
    """

    prompt: Lengths = Lengths(128, 128)
    output: Lengths = Lengths(128, 128)
    shared_prefix: int = 0
    turns: int = 1
    mix: Mix = Mix.GREEDY
    ids: tuple[int, int] | None = None
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every request's body, stronger than ours; None takes a field out."""

    def __post_init__(self) -> None:
        if self.ids is not None and self.turns > 1:
            raise ValueError("an answer's token ids are not known, so conversations are of words")

    def conversation(self, number: int) -> Conversation:
        """Number `number`."""
        rng = random.Random(f"{self.seed}/{number}")  # noqa: S311 - drawn to be drawn again
        turns = tuple(
            Turn(
                prompt=self._said(rng, self.prompt.draw(rng)),
                max_tokens=self.output.draw(rng),
                sampling=GREEDY if self.mix is Mix.GREEDY else _of_its_own(rng),
            )
            for _ in range(self.turns)
        )
        shared = random.Random(f"{self.seed}/shared")  # noqa: S311 - as above
        return Conversation(system=self._said(shared, self.shared_prefix) if self.shared_prefix else None, turns=turns)

    def body(self, conversation: Conversation, answers: Sequence[str], *, api: Api, model: str) -> dict[str, Any]:
        """The body of the request for the turn after `answers`, streamed and with its usage."""
        turn = conversation.turns[len(answers)]
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": turn.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **turn.sampling,
        }
        if api is Api.CHAT:
            body["messages"] = conversation.messages(answers)
        else:
            body["prompt"] = conversation.prompt(answers)
        return {name: value for name, value in {**body, **self.extra}.items() if value is not None}

    def _said(self, rng: random.Random, length: int) -> Prompt:
        if self.ids is None:
            return " ".join(rng.choices(WORDS, k=length))
        return tuple(rng.randint(*self.ids) for _ in range(length))


def _of_its_own(rng: random.Random) -> Mapping[str, Any]:
    """What OpenAI's API has for all servers."""
    return {
        "temperature": round(rng.uniform(0.5, 1.2), 3),
        "top_p": round(rng.uniform(0.8, 0.99), 3),
        "presence_penalty": round(rng.uniform(0.1, 1.0), 3),
        "frequency_penalty": round(rng.uniform(0.1, 1.0), 3),
        "seed": rng.randrange(2**31),
    }
