"""The two OpenAI answers, streamed or whole, as shapes over the same deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.answer import Choice
from service.api.openai.schemas import ChatChoice, ChatCompletion, Completion, TextChoice, WireUsage
from service.engine.generation import Delta

Payload = Mapping[str, Any]


def total_usage(choices: Sequence[Choice], *, rows_per_prompt: int) -> WireUsage:
    """Tokens of one request: a prompt counts once however many rows continue it."""
    usages = [choice.usage for choice in choices]
    prompts = [usage for usage in usages[::rows_per_prompt] if usage is not None]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages if usage is not None)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all parts of one answer share. `rows` is how many choices it has."""

    id: str
    created: int
    model: str
    rows: int
    rows_per_prompt: int
    include_usage: bool = False

    def chunk(self, kind: str, choices: list[Payload], usage: WireUsage | None = None) -> Payload:
        """One chunk of a stream. Clients that asked for the usage get a null in every chunk but the last."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return {**head, "usage": usage} if self.include_usage else head

    def usage_chunk(self, kind: str, choices: Sequence[Choice]) -> list[Payload]:
        """Only when asked for: clients that did not ask read `choices[0]` of every chunk."""
        if not self.include_usage:
            return []
        return [self.chunk(kind, [], total_usage(choices, rows_per_prompt=self.rows_per_prompt))]


def _reason(choice: Choice) -> str | None:
    return None if choice.finish_reason is None else choice.finish_reason.value


class ChatShape:
    """`chat.completion` and its chunks."""

    KIND = "chat.completion.chunk"

    def __init__(self, head: Head) -> None:
        self._head = head

    def opening(self) -> list[Payload]:
        role = {"role": "assistant", "content": ""}
        return [self._chunk(index, role) for index in range(self._head.rows)]

    def chunk(self, index: int, delta: Delta) -> list[Payload]:
        found = [self._chunk(index, {"content": delta.text})] if delta.text else []
        if delta.finish_reason is not None:
            found.append(self._chunk(index, {}, delta.finish_reason.value))
        return found

    def closing(self, choices: Sequence[Choice]) -> list[Payload]:
        return self._head.usage_chunk(self.KIND, choices)

    def body(self, choices: Sequence[Choice]) -> ChatCompletion:
        head = self._head
        return {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": total_usage(choices, rows_per_prompt=head.rows_per_prompt),
        }

    def _choice(self, index: int, choice: Choice) -> ChatChoice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": None,
            "finish_reason": _reason(choice),
        }

    def _chunk(self, index: int, delta: Payload, reason: str | None = None) -> Payload:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head.chunk(self.KIND, [choice])


class TextShape:
    """`text_completion`, whose chunks have the same name as the whole."""

    KIND = "text_completion"

    def __init__(self, head: Head) -> None:
        self._head = head

    def opening(self) -> list[Payload]:
        return []

    def chunk(self, index: int, delta: Delta) -> list[Payload]:
        if not delta.text and delta.finish_reason is None:
            return []
        reason = None if delta.finish_reason is None else delta.finish_reason.value
        return [self._head.chunk(self.KIND, [self._choice(index, delta.text, reason)])]

    def closing(self, choices: Sequence[Choice]) -> list[Payload]:
        return self._head.usage_chunk(self.KIND, choices)

    def body(self, choices: Sequence[Choice]) -> Completion:
        head = self._head
        return {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(i, "".join(one.text), _reason(one)) for i, one in enumerate(choices)],
            "usage": total_usage(choices, rows_per_prompt=head.rows_per_prompt),
        }

    def _choice(self, index: int, text: str, reason: str | None) -> TextChoice:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
