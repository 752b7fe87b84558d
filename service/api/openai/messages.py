"""A conversation as clients write it -> the plain one that a chat template takes."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.openai.schemas import ContentPart, Message
from service.api.openai.unsupported import unsupported
from service.errors import InvalidRequest

PlainMessage = dict[str, str]


def plain_messages(messages: Sequence[Message]) -> list[PlainMessage]:
    """Roles `system`, `user` and `assistant` with plain text.

    `developer` is OpenAI's newer word for `system`. All system messages are merged into one at the head:
    most templates accept it nowhere else. Raises InvalidRequest for tool calls and for anything but text.
    """
    system: list[str] = []
    turns: list[PlainMessage] = []
    for position, message in enumerate(messages):
        text = _text(message, f"messages[{position}]")
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            turns.append({"role": message.role, "content": text})
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*head, *turns]


def _text(message: Message, where: str) -> str:
    if message.role in ("tool", "function") or message.tool_calls or message.function_call is not None:
        raise unsupported("messages", "Tool calls in the conversation are not supported (yet).")
    match message.content:
        case str(text):
            return text
        case None if message.role == "assistant":
            return ""
        case None:
            raise InvalidRequest("A message needs content.", param=f"{where}.content", code="invalid_value")
        case parts:
            return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(parts))


def _part(part: ContentPart, where: str) -> str:
    foreign = (part.image_url, part.input_audio, part.file, part.url)
    if any(value is not None for value in foreign):
        raise unsupported(where, "Only text content is supported.")
    if part.type in ("text", "input_text", "output_text") and part.text is not None:
        return part.text
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    raise unsupported(where, "Only text content is supported.")
