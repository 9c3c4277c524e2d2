"""Items of instruction data and of classification tasks as documents of which only the answers are
learnt: prompt and answer from format strings, or a chat through the tokenizer's own chat
template."""

import json
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox

from btx_jax.config import FormatConfig
from btx_jax.config_dict import to_dict
from btx_jax.data.chats import Chats, Unusable, check_calls, says_something
from btx_jax.data.files import Problem, Row, find_field, shown_fields
from btx_jax.data.sources import Problems, is_unicode
from btx_jax.data.tokenizers import SPECIAL, Tokenizer
from btx_jax.errors import UserError


class Piece(NamedTuple):
    """A part of a document. learnt: whether its tokens are targets."""

    text: str
    learnt: bool


class Formatter:
    """Items -> pieces. Raises UserError when the tokenizer has no chat template and the format
    needs one."""

    def __init__(self, config: FormatConfig, tokenizer: Tokenizer, sequence_length: int):
        self._config = config
        self._template = chat_template(tokenizer) if config.messages else None
        if template := self._template:
            self._chats = Chats(lambda messages: template.render(messages, False))
        self.cutoff = min(config.cutoff or sequence_length, sequence_length)

    def identity(self) -> list[Any]:
        """What decides the pieces."""
        return [
            to_dict(self._config),
            self._template.source if self._template else None,
            self.cutoff,
        ]

    def items(self, rows: Iterable[Row], problems: Problems) -> Iterator[tuple[str, list[Piece]]]:
        """(place, pieces). What cannot be read or does not fit the format is counted in
        `problems`."""
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
        """Raises Unusable."""
        pieces = self._chat(item) if self._template else self._filled(item)
        if not all(is_unicode(piece.text) for piece in pieces):
            raise Unusable("no valid Unicode")
        return pieces

    def _filled(self, item: Mapping[str, Any]) -> list[Piece]:
        fields = dict(item)
        try:
            if isinstance(item.get("choices"), list) and "gold" in item:
                fields["choice"] = item["choices"][item["gold"]]
            prompt = _Fill(null="").vformat(self._config.prompt, (), fields)
            answer = _Fill(null=None).vformat(self._config.answer, (), fields)
        except KeyError as error:
            raise _no_field(error.args[0], item) from error
        except Unusable:
            raise
        except (IndexError, TypeError, AttributeError, ValueError) as error:
            raise Unusable("does not fit the format", str(error)) from error
        if not answer.strip():
            raise Unusable("empty answer")
        return [Piece(prompt, False), Piece(answer, True)]

    def _chat(self, item: Mapping[str, Any]) -> list[Piece]:
        """What the template puts between a prompt for an answer and the end of that answer is
        learnt."""
        assert self._template is not None
        try:
            said = find_field(item, self._config.messages)
        except KeyError:
            raise _no_field(self._config.messages, item) from None
        messages = self._chats.messages(said)
        pieces: list[Piece] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._template.render(messages[:number], add_generation_prompt=True)
            answered = self._template.render(messages[: number + 1], add_generation_prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise Unusable("the chat template changes earlier turns when later ones come")
            answer = Piece(answered[len(asked) :], says_something(message))
            check_calls(message, answer.text)
            pieces += [Piece(asked[len(done) :], False), answer]
            done = answered
        if not any(piece.learnt for piece in pieces):
            raise Unusable("no assistant's turn")
        return pieces


class _Fill(string.Formatter):
    """A format string's fields, of any type. null: what stands for null, None to raise Unusable."""

    def __init__(self, null: str | None):
        self._null = null

    def format_field(self, value: Any, format_spec: str) -> Any:
        if value is None:
            if self._null is None:
                raise Unusable("a field of the answer is null")
            return self._null
        if isinstance(value, bytes):  # as Parquet and tensorflow_datasets may hold text
            value = value.decode("utf-8")
        return super().format_field(value, format_spec)


def _no_field(field: Any, item: Mapping[str, Any]) -> Unusable:
    return Unusable(f"no field {field!r}", f"which has: {shown_fields(item)}")


class ChatTemplate:
    """As transformers renders it: jinja, sandboxed, with the special tokens as variables."""

    def __init__(self, source: str, special: Mapping[str, str], where: Path):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, ensure_ascii=False, **kwargs
        )
        try:
            self.source, self._template = source, environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: chat template: {error}") from error
        self._special = special

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special
            )
        except jinja2.TemplateError as error:
            raise Unusable(f"chat template: {error}") from error
        bos = self._special.get("bos_token", "")
        return text.removeprefix(bos) if bos else text  # every document gets it anyway


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """chat_template.jinja beside the tokenizer, or the one in tokenizer_config.json. Raises
    UserError when there is none."""
    folder = tokenizer.path.parent
    special: dict[str, str] = {}
    source, where = None, folder / SPECIAL[0]
    try:
        if where.is_file():
            config = json.loads(where.read_text(encoding="utf-8"))
            source = config.get("chat_template")
            for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
                token = config.get(role)
                special |= (
                    {role: token["content"] if isinstance(token, dict) else token} if token else {}
                )
        if (folder / "chat_template.jinja").is_file():
            where = folder / "chat_template.jinja"
            source = where.read_text(encoding="utf-8")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: damaged: {type(error).__name__}: {error}") from error
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: the tokenizer has no chat template (chat_template.jinja); give the format a"
            " prompt and an answer instead"
        )
    return ChatTemplate(source, special, where)


def encode_pieces(pieces: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(ids of the whole text, which of them are learnt). The text is encoded as one, as it is when
    a model is asked; a token across a border belongs to the piece in which it begins."""
    ids = tokenizer.encode("".join(piece.text for piece in pieces))
    learnt: list[bool] = []
    text = ""
    for piece in pieces[:-1]:
        text += piece.text
        learnt += [piece.learnt] * max(0, len(tokenizer.encode(text)) - len(learnt))
    return ids, (learnt + [pieces[-1].learnt] * len(ids))[: len(ids)]
