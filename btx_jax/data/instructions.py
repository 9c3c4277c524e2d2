"""Instruction data and classification items as documents in which only the answers are learnt:
prompt and answer from format strings, or a chat rendered by the tokenizer's own chat template."""

import json
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from btx_jax.config.config import FormatConfig
from btx_jax.config.config_dict import to_dict
from btx_jax.data.chat_template import TemplateError, chat_template
from btx_jax.data.chats import Chats, Unusable, check_calls, says_something
from btx_jax.data.files import Problem, Row, find_field, shown_fields
from btx_jax.data.sources import Problems, is_unicode
from btx_jax.data.tokenizers import Tokenizer

GIVEN = ("tools", "documents")  # fields of an item that are passed to the chat template


NO_TEMPLATE = "set prompt and answer in the format instead"


class Piece(NamedTuple):
    """A part of a document. learnt: whether its tokens are targets."""

    text: str
    learnt: bool


class Formatter:
    """Formats items as pieces. Raises UserError when the format needs a chat template and the
    tokenizer has none."""

    def __init__(self, config: FormatConfig, tokenizer: Tokenizer, sequence_length: int):
        self._config = config
        self._template = chat_template(tokenizer, NO_TEMPLATE) if config.messages else None
        if template := self._template:
            self._chats = Chats(lambda messages: template.render(messages).text)
        self.is_chat = bool(config.messages)
        self.cutoff = min(config.cutoff or sequence_length, sequence_length)

    def identity(self) -> list[Any]:
        """Everything that determines the pieces of an item."""
        return [
            to_dict(self._config),
            self._template.source if self._template else None,
            self.cutoff,
        ]

    def items(self, rows: Iterable[Row], problems: Problems) -> Iterator[tuple[str, list[Piece]]]:
        """Yield (location, pieces) of every item. Items that cannot be read or do not fit the
        format are counted in `problems`."""
        for place, value in rows:
            if isinstance(value, Problem):
                problems.add(value.kind, f"{place}, {value.detail}" if value.detail else place)
                continue
            assert isinstance(value, Mapping), "source_rows lets no plain text through"
            try:
                yield place, self.pieces(value)
            except Unusable as error:
                place += f", {error.detail}" if error.detail else ""
                problems.add(f"item skipped: {error}", place)

    def pieces(self, item: Mapping[str, Any]) -> list[Piece]:
        """An item's pieces. Raises Unusable."""
        pieces = self._chat(item) if self._template else self._filled(item)
        if not all(is_unicode(piece.text) for piece in pieces):
            raise Unusable("not valid Unicode")
        return pieces

    def _filled(self, item: Mapping[str, Any]) -> list[Piece]:
        fields = dict(item)
        try:
            if isinstance(choices := item.get("choices"), list) and "gold" in item:
                gold = item["gold"]
                if type(gold) is not int or not 0 <= gold < len(choices):
                    raise Unusable("gold is not the number of a choice", str(gold))
                fields["choice"] = choices[gold]
            prompt = _Fill(null="").vformat(self._config.prompt, (), fields)
            answer = _Fill(null=None).vformat(self._config.answer, (), fields)
        except KeyError as error:
            raise _no_field(error.args[0], item) from error
        except Unusable:
            raise
        except (
            IndexError, TypeError, AttributeError, ValueError, MemoryError, RecursionError
        ) as error:  # fmt: skip
            raise Unusable("does not fit the format", str(error)) from error
        if not answer.strip():
            raise Unusable("empty answer")
        return [Piece(prompt, False), Piece(answer, True)]

    def _chat(self, item: Mapping[str, Any]) -> list[Piece]:
        """A chat's pieces. What the template puts between the prompt for an answer and the end of
        that answer is learnt."""
        assert self._template is not None
        try:
            said = find_field(item, self._config.messages)
        except KeyError:
            raise _no_field(self._config.messages, item) from None
        messages = self._chats.messages(said)
        given = {name: _objects(name, item[name]) for name in GIVEN if item.get(name)}
        pieces = self._marked if self._template.marks_answers else self._turns
        try:
            return pieces(messages, given)
        except TemplateError as error:
            raise Unusable(str(error)) from error

    def _marked(self, messages: list[Any], given: Mapping[str, Any]) -> list[Piece]:
        """A chat's pieces if the template's `generation` tags mark what is learnt."""
        assert self._template is not None
        text, spans = self._template.render(messages, **given)
        for message in messages:
            check_calls(message, text)
        pieces, done = [], 0
        for start, stop in spans:
            pieces += [Piece(text[done:start], False), Piece(text[start:stop], True)]
            done = stop
        if not any(piece.text.strip() for piece in pieces if piece.learnt):
            raise Unusable("no assistant turn")
        return [piece for piece in [*pieces, Piece(text[done:], False)] if piece.text]

    def _turns(self, messages: list[Any], given: Mapping[str, Any]) -> list[Piece]:
        assert self._template is not None
        pieces: list[Piece] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._template.render(messages[:number], True, **given).text
            answered = self._template.render(messages[: number + 1], **given).text
            if not asked.startswith(done):
                raise Unusable("the chat template changes earlier turns when later ones are added")
            if not answered.startswith(asked):
                told = "the chat template renders an answer that does not begin with its prompt"
                raise Unusable(told)
            answer = Piece(answered[len(asked) :], says_something(message))
            check_calls(message, answer.text)
            pieces += [Piece(asked[len(done) :], False), answer]
            done = answered
        if not any(piece.learnt for piece in pieces):
            raise Unusable("no assistant turn")
        return pieces


class _Fill(string.Formatter):
    """Fills a format string with fields of any type. null: replacement for null; None to raise
    Unusable."""

    def __init__(self, null: str | None):
        self._null = null

    def format_field(self, value: Any, format_spec: str) -> Any:
        if value is None:
            if self._null is None:
                raise Unusable("a field of the answer is null")
            return self._null
        if self._null is None and isinstance(value, Mapping | list):
            told = "a field of the answer is not text; name a part of it, such as {field[0]}"
            raise Unusable(told, type(value).__name__)
        if isinstance(value, bytes):  # text in Parquet and tensorflow_datasets may be bytes
            value = value.decode("utf-8")
        return super().format_field(value, format_spec)


def _objects(name: str, value: Any) -> list[Any]:
    """The list in `tools` or `documents`, which may be JSON text. Raises Unusable."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise Unusable(f"{name} is not a list")
    return [_without_null(entry) for entry in value]


def _without_null(value: Any) -> Any:
    """The value without null fields: Parquet gives every object the fields of all objects."""
    if isinstance(value, Mapping):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value


def _no_field(field: Any, item: Mapping[str, Any]) -> Unusable:
    return Unusable(f"no field {field!r}", f"which has: {shown_fields(item)}")


def encode_pieces(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(ids of the whole text, whether each is learnt). The text is encoded as a whole, as when a
    model is prompted; a token that extends into a learnt piece is learnt, as in transformers'
    assistant masks."""
    ids, told = tokenizer.encode_with_offsets("".join(piece.text for piece in pieces))
    # Some tokenizers exclude spaces from a token's span: text outside all spans belongs to the next
    # token.
    ends = [0, *(end for _, end in told)]
    offsets = [(min(start, before), end) for (start, end), before in zip(told, ends, strict=False)]
    learnt = [False] * len(ids)
    at = number = 0
    for piece in pieces:
        at += len(piece.text)
        while number < len(ids) and offsets[number][1] <= at - len(piece.text):
            number += 1  # ends before the piece
        if piece.learnt and piece.text:
            for i in range(number, len(ids)):
                if offsets[i][0] >= at:
                    break
                learnt[i] = True
    return ids, learnt
