"""Items of instruction data and of classification tasks as documents of which only the answers are
learnt: prompt and answer from format strings, or a chat through the tokenizer's own chat
template."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from btx_jax.config import FormatConfig
from btx_jax.config_dict import to_dict
from btx_jax.data.chat import TemplateError, chat_template
from btx_jax.data.sources import Problems, read_json_lines
from btx_jax.data.tokenizers import Tokenizer


class Piece(NamedTuple):
    """A part of a document. learnt: whether its tokens are targets."""

    text: str
    learnt: bool


class Unusable(ValueError):
    """An item that the format does not fit; the message says why."""


class Formatter:
    """Items -> pieces. Raises UserError when the tokenizer has no chat template and the format
    needs one."""

    def __init__(self, config: FormatConfig, tokenizer: Tokenizer, sequence_length: int):
        self._config = config
        self._template = chat_template(tokenizer) if config.messages else None
        self.is_chat = bool(config.messages)
        self.cutoff = min(config.cutoff or sequence_length, sequence_length)

    def identity(self) -> list[Any]:
        """What decides the pieces."""
        return [
            to_dict(self._config),
            self._template.source if self._template else None,
            self.cutoff,
        ]

    def items(self, files: list[Path], problems: Problems) -> Iterator[list[Piece]]:
        """Of the items of JSON lines. What does not fit the format is counted in `problems`."""
        for file in files:
            for number, item in enumerate(read_json_lines(str(file), "config.data"), start=1):
                try:
                    yield self.pieces(item)
                except Unusable as error:
                    problems.add(f"item skipped: {error}", f"{file}, item {number}")

    def pieces(self, item: Mapping[str, Any]) -> list[Piece]:
        """Raises Unusable."""
        return self._chat(item) if self._template else self._filled(item)

    def _filled(self, item: Mapping[str, Any]) -> list[Piece]:
        fields = dict(item)
        try:
            if isinstance(item.get("choices"), list) and "gold" in item:
                fields["choice"] = item["choices"][item["gold"]]
            prompt, answer = (
                self._config.prompt.format_map(fields),
                self._config.answer.format_map(fields),
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise Unusable(
                f"no field {error}" if isinstance(error, KeyError) else f"format: {error}"
            ) from error
        if not answer.strip():
            raise Unusable("empty answer")
        return [Piece(prompt, False), Piece(answer, True)]

    def _chat(self, item: Mapping[str, Any]) -> list[Piece]:
        """What the template puts between a prompt for an answer and the end of that answer is
        learnt."""
        assert self._template is not None
        messages = item.get(self._config.messages)
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            raise Unusable(f"no list of messages in field {self._config.messages!r}")
        try:
            return self._marked(messages) if self._template.marks_answers else self._turns(messages)
        except TemplateError as error:
            raise Unusable(str(error)) from error

    def _marked(self, messages: list[Any]) -> list[Piece]:
        """The template's `generation` tags say what is learnt."""
        assert self._template is not None
        text, spans = self._template.render(messages)
        pieces, done = [], 0
        for start, stop in spans:
            pieces += [Piece(text[done:start], False), Piece(text[start:stop], True)]
            done = stop
        if not any(piece.text.strip() for piece in pieces if piece.learnt):
            raise Unusable("no assistant's turn")
        return [piece for piece in [*pieces, Piece(text[done:], False)] if piece.text]

    def _turns(self, messages: list[Any]) -> list[Piece]:
        assert self._template is not None
        pieces: list[Piece] = []
        done = ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            asked = self._template.render(messages[:number], add_generation_prompt=True).text
            answered = self._template.render(messages[: number + 1]).text
            if not asked.startswith(done) or not answered.startswith(asked):
                raise Unusable("the chat template changes earlier turns when later ones come")
            pieces += [Piece(asked[len(done) :], False), Piece(answered[len(asked) :], True)]
            done = answered
        if not pieces:
            raise Unusable("no assistant's turn")
        return pieces


def encode_pieces(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(ids of the whole text, which of them are learnt). The text is encoded as one, as it is when a
    model is asked; a token that reaches into a learnt piece is learnt, as in transformers'
    assistant masks."""
    ids, offsets = tokenizer.encode_with_offsets("".join(piece.text for piece in pieces))
    learnt = [False] * len(ids)
    at = number = 0
    for piece in pieces:
        at += len(piece.text)
        while number < len(ids) and offsets[number][1] <= at - len(piece.text):
            number += 1  # ends in front of the piece
        if piece.learnt and piece.text:
            for i in range(number, len(ids)):
                if offsets[i][0] >= at:
                    break
                learnt[i] = True
    return ids, learnt
