"""Text <-> token ids, behind one small interface: sentencepiece `.model` files and Hugging Face
`tokenizer.json`."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from btx_jax.errors import UserError
from btx_jax.output import check_free, new_file, none_left_empty

NAMES = ("tokenizer.json", "tokenizer.model")  # the first knows tokens that were added later
SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")  # name the special tokens
COMPANIONS = (
    *SPECIAL,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Tokenizer(Protocol):
    """vocab_size: one more than the largest id. bos, eos: ids, or None when the vocabulary has
    none. eos_text: what in a text is read as EOS, "" for nothing. path: the file it was read
    from."""

    path: Path
    vocab_size: int
    bos: int | None
    eos: int | None
    eos_text: str

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without special tokens."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: with what the tokenizer itself puts in front, BOS for a
        Llama, and nothing behind."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class SentencePieceTokenizer:
    eos_text: str = ""  # sentencepiece never reads a control symbol from a text

    def __init__(self, path: Path):
        self.path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path} is not a sentencepiece model: {str(error).splitlines()[0]}"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos, self.eos = (bos if bos >= 0 else None), (eos if eos >= 0 else None)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return ([self.bos] if self.bos is not None else []) + self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A tokenizer.json; its special tokens are named by tokenizer_config.json or
    special_tokens_map.json beside it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}") from error
        self.vocab_size = (
            max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        self.bos = self._special("bos_token", ("<s>", "<|begin_of_text|>", "<bos>", "<|im_start|>"))
        self.eos = self._special(
            "eos_token", ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>")
        )
        self.eos_text: str = "" if self.eos is None else str(self._tokenizer.id_to_token(self.eos))

    def _special(self, role: str, usual: tuple[str, ...]) -> int | None:
        for companion in (self.path.parent / name for name in SPECIAL):
            if companion.is_file():
                try:
                    config = json.loads(companion.read_text(encoding="utf-8"))
                    if role in config:
                        token = (
                            config[role]["content"]
                            if isinstance(config[role], dict)
                            else config[role]
                        )
                        return self._tokenizer.token_to_id(token) if token else None
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"{companion}: damaged: {type(error).__name__}: {error}"
                    ) from error
        return next((i for i in map(self._tokenizer.token_to_id, usual) if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        while ids and ids[-1] == self.eos:
            ids.pop()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def find_tokenizer(path: str | os.PathLike) -> Path:
    """The tokenizer file: the path itself, or the one in that directory. Raises UserError when
    there is none."""
    path = Path(path)
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"no tokenizer in {path}: expected {' or '.join(NAMES)}; put one there")
    if not path.is_file():
        raise UserError(f"config.data.tokenizer: {path} does not exist")
    return path


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    found = find_tokenizer(path)
    return HuggingFaceTokenizer(found) if found.suffix == ".json" else SentencePieceTokenizer(found)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give the same ids: equal files, or two tokenizer.json that differ only outside
    vocabulary, merges and added tokens."""
    if tokenizer_sha256(a) == tokenizer_sha256(b):
        return True
    if a.path.suffix != ".json" or b.path.suffix != ".json":
        return False

    def vocabulary(path: Path) -> tuple:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = dict(values["model"])
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in model.pop("merges", None) or ()
        ]
        return (
            model,
            merges,
            values.get("added_tokens"),
            values.get("normalizer"),
            values.get("pre_tokenizer"),
        )

    return vocabulary(a.path) == vocabulary(b.path)


def copy_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Put the tokenizer file, under its usual name, and its companions (special tokens, chat
    template, when to stop) into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    name = NAMES[0] if tokenizer.path.suffix == ".json" else NAMES[1]
    others = COMPANIONS + (NAMES if tokenizer.path.name in NAMES else ())
    for source, target in [
        (tokenizer.path, name),
        *((tokenizer.path.parent / c, c) for c in others),
    ]:
        if source.is_file() and source.resolve() != (directory / target).resolve():
            shutil.copyfile(source, directory / target)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, target: Path) -> None:
    """Train a byte-fallback BPE that gives back any text exactly: no normalisation, every space
    kept, digits apart."""
    check_free(target)
    try:
        with (
            none_left_empty(target.parent),
            new_file(target) as partial,
            partial.open("wb") as writer,
        ):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_pieces(texts),
                model_writer=writer,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                split_digits=True,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=False,
                character_coverage=0.9995,
                max_sentence_length=2**20,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text:"
            f" {str(error).splitlines()[-1]}"
        ) from error


def _pieces(texts: Iterable[str], size: int = 4000) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size].replace("\0", "")
