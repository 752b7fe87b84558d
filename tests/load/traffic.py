"""Mixed traffic for the soak: every kind of request that clients make, right and wrong, and clients that leave."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

LEAVES = 0.1
"""Share of the requests for generation whose client does not stay for the end."""

Body = dict[str, Any]

WRONG: tuple[tuple[str, str, Any, int], ...] = (  # why, path, body or bytes, status
    ("unknown parameter", "/generate", {"prompt": "x", "max_tokenz": 1}, 400),
    ("no prompt", "/generate", {"max_tokens": 1}, 400),
    ("not JSON", "/generate", b"{", 400),
    ("too long", "/generate", {"prompt": "x" * 5000}, 400),
    ("temperature", "/v1/chat/completions", {"model": "default", "messages": [], "temperature": -1}, 400),
    ("unsupported", "/v1/completions", {"model": "default", "prompt": "x", "logprobs": 3}, 400),
    ("model", "/v1/completions", {"model": "nobody", "prompt": "x"}, 404),
    ("path", "/v1/nowhere", {}, 404),
)


@dataclass
class Tally:
    """What became of the requests. `unexpected` are outcomes that must not be, with what was asked."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.outcomes.total()


PROMPTS = 300
"""Different ones. The tokenizer's own cache keeps 10,000 texts (tokenizers, BPE), and a tiny model's never splits a
prompt into words: were each prompt new, 2.7 kB a request would go there, for as long as a soak lasts."""


class Client:
    """One of them: a request after the other until it is told to stop. Belongs to the event loop."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, *, seed: int) -> None:
        self._http = http
        self._tally = tally
        self._rng = random.Random(seed)
        self._prompts = [_words(random.Random(number)) for number in range(PROMPTS)]

    async def run(self, going: Callable[[], bool]) -> None:
        """Ask while `going`."""
        while going():
            what = self._rng.random()
            if what < 0.1:
                await self._count("wrong", self._wrong())
            elif what < 0.15:
                await self._count("stranger", self._stranger())
            elif what < 0.25:
                await self._count("look", self._look())
            elif self._rng.random() < LEAVES:
                await self._count("left", self._leave())
            else:
                await self._count("served", self._stay())

    async def _count(self, outcome: str, asking: Awaitable[str]) -> None:
        """`asking` says what went wrong, or nothing."""
        try:
            problem = await asking
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        self._tally.outcomes[outcome] += 1
        if problem:
            self._tally.unexpected.append(f"{outcome}: {problem}")

    # -- kinds --------------------------------------------------------------------------------------------

    async def _wrong(self) -> str:
        why, path, body, status = self._rng.choice(WRONG)
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = await self._http.post(path, content=content, headers={"content-type": "application/json"})
        return "" if answer.status_code == status else f"{why}: {answer.status_code}, not {status}"

    async def _stranger(self) -> str:
        headers = self._rng.choice([{"authorization": "Bearer nonsense"}, {"authorization": "Bearer a.b.c"}])
        answer = await self._http.post("/generate", json={"prompt": "x"}, headers=headers)
        return "" if answer.status_code == 401 else str(answer.status_code)

    async def _look(self) -> str:
        path = self._rng.choice(["/health", "/readyz", "/v1/models", "/livez"])
        answer = await self._http.get(path)
        return "" if answer.status_code == 200 else f"{path}: {answer.status_code}"

    async def _stay(self) -> str:
        path, body = self._ask()
        if not body["stream"]:
            answer = await self._http.post(path, json=body)
            return "" if answer.status_code == 200 and "error" not in answer.json() else _told(path, body, answer.text)
        last = ""
        async with self._http.stream("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith('data: {"error"'):
                    return _told(path, body, line)
        return "" if answer.status_code == 200 and last == "data: [DONE]" else _told(path, body, f"ended with {last!r}")

    async def _leave(self) -> str:
        """Before the answer, or somewhere in it."""
        path, body = self._ask()
        body["max_tokens"] = 200
        patience = self._rng.expovariate(1 / 0.05)
        try:
            async with asyncio.timeout(patience), self._http.stream("POST", path, json=body) as answer:
                pieces = self._rng.randrange(5)
                async for _ in answer.aiter_bytes():
                    pieces -= 1
                    if pieces < 0:
                        break
        except TimeoutError:
            return ""
        return "" if answer.status_code == 200 else _told(path, body, str(answer.status_code))

    # -- bodies -------------------------------------------------------------------------------------------

    def _ask(self) -> tuple[str, Body]:
        rng = self._rng
        prompt = rng.choice(self._prompts)
        body: Body = {"max_tokens": rng.choice([1, 4, 16, 60]), "stream": rng.random() < 0.5, **self._sampling()}
        match rng.choice(["native", "native", "chat", "completions"]):
            case "chat":
                return "/v1/chat/completions", {"model": "default", "messages": _conversation(prompt), **body}
            case "completions":
                return "/v1/completions", {"model": "default", "prompt": prompt, "n": rng.choice([1, 1, 2]), **body}
            case _:
                return "/generate", {"prompt": prompt, "chat": rng.random() < 0.3, **body}

    def _sampling(self) -> Body:
        rng = self._rng
        chosen: Body = {"temperature": rng.choice([0, 0.7, 1.3])}
        for chance, more in (
            (0.3, {"seed": rng.randrange(1000)}),
            (0.2, {"top_p": 0.9}),
            (0.2, {"stop": rng.choice(["a", ["xyz", "\n"], "never said by anybody"])}),
            (0.1, {"frequency_penalty": 0.5, "presence_penalty": 0.2}),
            (0.1, {"logit_bias": {"5": -100}}),
        ):
            chosen |= more if rng.random() < chance else {}
        return chosen


def _words(rng: random.Random) -> str:
    """A prompt. Some begin alike, so that the prefix cache has something to find."""
    begin = rng.choice(["", "Once there was a lighthouse keeper. ", f"{rng.randrange(10**9)} "])
    words = (rng.choice(["sea", "ship", "light", "night", "é", "日"]) for _ in range(rng.choice([3, 10, 40, 100])))
    return begin + " ".join(words)


def _conversation(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


def _told(path: str, body: Mapping[str, Any], what: str) -> str:
    return f"{path} {json.dumps({**body, 'prompt': '...', 'messages': '...'})}: {what[:300]}"


def clients(http: httpx.AsyncClient, tally: Tally, count: int, *, seed: int = 1) -> Iterator[Client]:
    """Several, each with a fate of its own."""
    return (Client(http, tally, seed=number) for number in itertools.islice(itertools.count(seed), count))
