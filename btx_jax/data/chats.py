"""Convert chats from data sets' formats to the messages of a chat template."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message]], str]

SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names: {from, value}
TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's types of text parts
CALL = {"type": "function", "id": "call00000", "function": {"name": "look", "arguments": {}}}
WORD = "wombat"  # a word that occurs in no template


class Unusable(ValueError):
    """An item that does not fit the format. The message is the kind of problem, which is counted;
    detail describes this occurrence."""

    def __init__(self, why: str, detail: str = ""):
        super().__init__(why)
        self.detail = detail


class Chats:
    """Converts chats for one template. What the template accepts is passed on unchanged, as in
    transformers: lists of content parts, and null as the content of an assistant's turn that calls
    a tool. What it would fail on, or print as Python's `[{'type': ...` or `None`, becomes text:
    parts joined by a space, as in transformers' server, and an empty string for null."""

    def __init__(self, render: Render):
        self._takes_parts = _takes_parts(render)
        self._takes_null = {
            calls: _takes_null(render, {"tool_calls": [CALL]} if calls else {})
            for calls in (False, True)
        }

    def messages(self, value: Any) -> list[Message]:
        """Messages from a list of {role, content} or {from, value}, or from JSON text of such a
        list. Raises Unusable."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
            raise Unusable("not a list of messages")
        return [self._message(m) for m in value]

    def _message(self, said: Mapping[str, Any]) -> Message:
        # Parquet gives every message the fields of all messages.
        message = {name: value for name, value in said.items() if value is not None}
        if "role" not in message and "from" in message:
            speaker = message.pop("from")
            message["role"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
            message["content"] = message.pop("value", None)
        if not isinstance(message.get("role"), str):
            raise Unusable("a message without a role")
        message["content"] = self._content(message)
        return message

    def _content(self, message: Message) -> Any:
        content = message.get("content")
        if content is None:
            if message["role"] == "user":
                raise Unusable("a user's turn without content")
            return None if self._takes_null[bool(message.get("tool_calls"))] else ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise Unusable("a message's content is not text", type(content).__name__)
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise Unusable("a message's content has parts that are not text", str(kind))
        texts = [part["text"] for part in content]
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in texts]
        return " ".join(texts)


def _takes_parts(render: Render) -> bool:
    text = _rendered(render, {"role": "user", "content": [{"type": "text", "text": WORD}]})
    return text is not None and WORD in text and not any(f"{q}type{q}" in text for q in "'\"")


def _takes_null(render: Render, calls: Message) -> bool:
    user = {"role": "user", "content": WORD}
    null, empty = (
        _rendered(render, user, {"role": "assistant", "content": content} | calls)
        for content in (None, "")
    )
    return null is not None and null.count("None") == (empty or null).count("None")


def _rendered(render: Render, *messages: Message) -> str | None:
    try:
        return render(list(messages))
    except Exception:  # templates may raise anything
        return None


def says_something(message: Message) -> bool:
    """Whether an assistant's turn contains anything to learn; an empty one is only read."""
    content = message["content"] or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return any(parts) or bool(message.get("tool_calls"))


def check_calls(message: Message, rendered: str) -> None:
    """Raise Unusable when the rendered text lacks a turn's tool calls."""
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise Unusable("tool calls that are not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise Unusable("a tool call without the function's name")
        if name not in rendered:
            raise Unusable("the chat template does not render tool calls")
