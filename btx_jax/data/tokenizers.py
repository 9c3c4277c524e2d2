"""Text <-> token ids: one class, based on the tokenizers library, for all kinds of tokenizer
files."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from btx_jax.buckets import explained, is_on_bucket, local_copy
from btx_jax.data import tokenizer_files
from btx_jax.data.tokenizer_classes import AS_IT_IS
from btx_jax.data.tokenizer_files import (
    ADDED,
    CONFIG,
    NAMES,
    SPECIAL_MAP,
    TEMPLATE,
    TEMPLATES,
    Files,
)
from btx_jax.errors import ConfigError, UserError
from btx_jax.hub import TOKENIZER, TOKENIZER_FILES, resolve
from btx_jax.hub_names import matches
from btx_jax.output import filled, new_file

__all__ = ["Tokenizer", "copy_tokenizer", "difference", "find_tokenizer", "load_tokenizer"]

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of sentencepiece's byte fallback
# Guesses where no file names the token, the most likely first.
_USUAL = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<|im_start|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>"),
}
_TEMPLATE_FILES = (TEMPLATE, "chat_template.json")


class Tokenizer:
    """A tokenizer.

    path: the file it was read from. vocab_size: one more than the largest id. bos, eos: ids, or
    None. prefix: ids that the tokenizer itself puts before a text, and so before every document and
    prompt: BOS for Llama, nothing for Qwen. named: role such as `bos_token` -> its text. templates:
    name -> chat template.
    """

    def __init__(self, path: Path, files: Files):
        self.path, self.named, self.templates = path, files.named, files.templates
        self._files, self._tokenizer = files, files.backend
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos, self.eos = (self._special(role) for role in ("bos_token", "eos_token"))
        self.prefix, self.suffix = self._around()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"verbatim": self._tokenizer.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        verbatim = state.pop("verbatim")  # not pickled by the library
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = verbatim

    def _special(self, role: str) -> int | None:
        """Id of a special token: by its name in the tokenizer's files, else by its number in the
        model's config.json, so that EOS is never lost, else by its usual names."""
        if role in self.named:
            return self._tokenizer.token_to_id(self.named[role])
        alone = not (self.path.parent / CONFIG).is_file()
        if self.path.suffix == ".json" and (alone or role == "eos_token"):
            told = tokenizer_files.read_json(self.path.parent / "config.json").get(f"{role}_id")
            told = told[0] if isinstance(told, list) and told else told
            if isinstance(told, int) and self._tokenizer.id_to_token(told) is not None:
                return told
        if self.path.suffix != ".json" or not alone:
            return None
        ids = map(self._tokenizer.token_to_id, _USUAL[role])
        return next((i for i in ids if i is not None), None)

    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts before and after a text."""
        for text in ("a", "0", ".", "\n"):  # the vocabulary contains at least one of these
            bare = self._tokenizer.encode(text, add_special_tokens=False).ids
            whole = self._tokenizer.encode(text, add_special_tokens=True).ids
            for start in range(len(whole) - len(bare) + 1) if bare else ():
                if whole[start : start + len(bare)] == bare:
                    return whole[:start], whole[start + len(bare) :]
            if bare:
                raise UserError(
                    f"{self.path}: its post-processor changes the tokens of the"
                    " text itself, which is not supported"
                )
        return whole, []

    @property
    def eos_text(self) -> str:
        """EOS as written out in a text."""
        return "" if self.eos is None else self.token_of(self.eos)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that decoding skips."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens written out in it are recognised. Raises UserError
        for invalid Unicode (a lone surrogate)."""
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, with the span of characters [start, stop) that each id represents."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise NotUnicode("not valid Unicode: a lone surrogate") from error
        except BaseException as error:  # the library's panics are not Exceptions
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"{self.path}: crashed on a text: {str(error).splitlines()[0]}"
            ) from error

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, including `prefix`."""
        return self.prefix + self.encode(text)

    def decode(self, ids: Iterable[int], behind: Sequence[int] = (), special: bool = False) -> str:
        """The text that `ids` add when they follow the ids `behind`. What tokenizers do only at the
        beginning of a text (Llama's removes a space) is not done in its middle. special: whether to
        write out special tokens."""
        if not behind:
            return self._decode(ids, special)
        before, whole = self._decode(behind, special), self._decode([*behind, *ids], special)
        if whole.startswith(before):
            return whole[len(before) :]
        # Consecutive byte tokens are decoded together, so an incomplete character in `ids` would
        # spoil the complete characters of the byte tokens at the end of `behind`, which are
        # therefore left out.
        ends = [
            i for i, number in enumerate(behind, 1) if not BYTE.fullmatch(self.token_of(number))
        ]
        if ends and ends[-1] < len(behind):
            return self.decode(ids, behind[: ends[-1]], special)
        pairs = enumerate(zip(before, whole, strict=False))
        return whole[next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole))) :]

    def _decode(self, ids: Iterable[int], special: bool) -> str:
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)
        return clean_up(text) if self._files.cleans_up else text

    @property
    def cleaned(self) -> Sequence[str]:
        """The strings that decoding changes."""
        return CLEANED if self._files.cleans_up else ()

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, number: int) -> str:
        """The token of an id; "" for an id that the vocabulary skips."""
        return self._tokenizer.id_to_token(number) or ""

    def with_bos(self, added: bool) -> "Tokenizer":
        """This tokenizer with or without BOS in front of every text. Raises UserError when it has
        no BOS."""
        if added and self.bos is None:
            raise UserError(f"config.data.bos: {self.path} has no BOS token; set it to 'auto'")
        if added == (self.prefix[:1] == [self.bos]) and len(self.prefix) == int(added):
            return self
        backend = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        backend.encode_special_tokens = self._tokenizer.encode_special_tokens  # missing from to_str
        bos = [self.token_of(self.bos)] if added and self.bos is not None else []
        tokenizer_files.frame(backend, bos, [self.token_of(i) for i in self.suffix])
        files = Files(backend, self.named, self.templates, self._files.cleans_up, verbatim=False)
        return Tokenizer(self.path, files)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of everything that determines ids; unchanged when another version of a library saves
        the file again."""
        told = json.dumps(self._function(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def _function(self) -> dict[str, Any]:
        spec = json.loads(self._tokenizer.to_str())
        return {
            "model": spec["model"],
            "normalizer": spec["normalizer"],
            "pre_tokenizer": spec["pre_tokenizer"],
            "added": spec["added_tokens"],
            "around": [self.prefix, self.suffix, self.eos],
        }

    def to_json(self) -> str:
        """tokenizer.json, with merges in the form that libraries before 0.20 can also read."""
        spec = json.loads(self._tokenizer.to_str())
        merges = spec["model"].get("merges")
        if merges and not any(" " in half for pair in merges for half in pair):
            spec["model"]["merges"] = [" ".join(pair) for pair in merges]
        return json.dumps(spec, ensure_ascii=False, indent=1)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and the files that name special tokens and chat templates, into a
        directory. Whatever transformers would rebuild depending on the model family is written out,
        so that the tokenizer behaves the same with any model."""
        with filled(directory) as local:
            self._save(local)

    def _save(self, directory: Path) -> None:
        folder = self.path.parent
        named = self.path.name in NAMES or self.path.suffix == ".json"
        kept = [*_TEMPLATE_FILES, *(["tokenizer.model"] if named else [])]
        if named and (folder / TEMPLATES).is_dir() and not (directory / TEMPLATES).exists():
            shutil.copytree(folder / TEMPLATES, directory / TEMPLATES)
        config = tokenizer_files.read_json(folder / CONFIG) if named else {}
        if self._files.verbatim:
            kept += [SPECIAL_MAP, ADDED]
            _copy(self.path, directory / NAMES[0])
            found = {"bos_token": self.bos, "eos_token": self.eos}
            for role, number in found.items():  # the model's config.json is not copied
                if role not in self.named and number is not None:
                    config[role] = self.token_of(number)
            if str(config.get("tokenizer_class")).removesuffix("Fast") not in AS_IT_IS:
                config["tokenizer_class"] = "PreTrainedTokenizerFast"  # for any family
        else:
            _write(directory / NAMES[0], self.to_json())
            config = self._config(config)
        _write(directory / CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        for name in kept if named else ():
            if (folder / name).is_file():
                _copy(folder / name, directory / name)
        if self.path.suffix == ".model":
            _copy(self.path, directory / NAMES[1])

    def _config(self, config: dict[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json for a self-contained tokenizer.json."""
        said = (
            "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy",
            "sp_model_kwargs", "from_slow", "auto_map",
        )  # fmt: skip
        kept = {key: value for key, value in config.items() if key not in said}
        eos = {} if self.eos is None else {"eos_token": self.token_of(self.eos)}
        return kept | eos | dict(self.named) | {"tokenizer_class": "PreTrainedTokenizerFast"}


CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class NotUnicode(UserError):
    """A text that no tokenizer can encode."""


def clean_up(text: str) -> str:
    """Remove spaces before punctuation, as transformers' clean_up_tokenization_spaces does."""
    for part in CLEANED:
        text = text.replace(part, part.strip())
    return text


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer file: the path itself, or the file in that directory. Raises UserError when
    there is none."""
    named, path = path, _at_hand(Path(path) if isinstance(path, str) else path)
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file() and (
                name != "vocab.json" or (path / "merges.txt").is_file()
            ):
                return path / name
        wanted = " or ".join(NAMES[:2])
        raise UserError(f"no tokenizer in {named}: expected {wanted}; put one there")
    if not path.is_file():
        raise UserError(f"{named} does not exist")
    return path


def _at_hand(path: Path) -> Path:
    """The path itself, or a local copy of a tokenizer's files in a bucket."""
    if not is_on_bucket(path):
        return path
    is_file = path.suffix in (".model", ".json")
    folder, name = (path.parent, path.name) if is_file else (path, "")
    with explained(str(path)):
        try:
            copy = local_copy(
                folder, lambda at: at == name or any(matches(at, each) for each in TOKENIZER_FILES)
            )
        except FileNotFoundError as error:
            raise UserError(f"no tokenizer in {path}") from error
    return copy / name


def load_tokenizer(path: str | Path) -> Tokenizer:
    found = find_tokenizer(path)
    return Tokenizer(found, tokenizer_files.read_files(found))


def named_tokenizer(name: str, key: str) -> Tokenizer:
    """The tokenizer at a path or of a name on the Hub. Raises ConfigError, naming the key, when
    there is none or it cannot be read."""
    path = resolve(name, key, TOKENIZER)
    try:
        return load_tokenizer(path)
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from error


def copy_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(directory)


def difference(a: Tokenizer, b: Tokenizer, rows: int) -> str:
    """ "" when both give the same ids for every text; otherwise, briefly, how b differs from a.

    They give the same ids if their `sha256` is equal, or if vocabulary, merges and added tokens are
    equal and so are the ids of some thousand texts that were chosen to tell pipelines apart
    (transformers 5 writes a Llama's prefix differently from 4). The answer begins with `adds ` if b
    only has additional tokens. rows: number of embeddings; ids from `rows` on are ignored, as no
    model can read them.
    """
    if a.sha256 == b.sha256:
        return ""
    ours, theirs = (
        {
            token: i
            for token, i in t._tokenizer.get_vocab(with_added_tokens=True).items()
            if i < rows
        }
        for t in (a, b)
    )
    changed = [token for token, i in ours.items() if theirs.get(token) != i]
    if changed:
        return f"{len(changed)} tokens have different ids, {_few(changed)}"
    if (a.prefix, a.suffix) != (b.prefix, b.suffix):
        return f"it prepends {b.prefix} to a text, not {a.prefix}"
    if a.eos != b.eos:
        return f"its end-of-text token is {b.eos}, not {a.eos}"
    more = sorted(set(theirs) - set(ours), key=theirs.__getitem__)
    unread = {t for x in (a, b) for t in x._tokenizer.get_vocab() if t not in ours}
    for text in _probes(a, 2000 if _rules(a) == _rules(b) else len(ours)):
        if a.encode(text) != b.encode(text) and not any(token in text for token in unread):
            return f"{text[:40]!r} has different ids"
    return f"adds {_few(more)}" if more else ""


def _rules(tokenizer: Tokenizer) -> Any:
    model = json.loads(tokenizer._tokenizer.to_str())["model"]
    return [model.get("merges"), model["vocab"] if isinstance(model["vocab"], list) else None]


def _few(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:4])) + (f" and {len(tokens) - 4} more" if tokens[4:] else "")


def _probes(tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts that distinguish pipelines: spaces in every position, digits, case, contractions,
    compositions, other scripts, emoji, code, bytes; and `count` pieces of the vocabulary, alone and
    within a text."""
    words = [
        "", " ", "  ", "\n", "\t", "a", " a", "a ", "  a  b ", "A b\nC\r\n\r\nd", "\n\n  x",
        "don't I'LL we've", "1", "12", "123", "1234567", "3.14e-5", "x1y22z333", "é", "e\u0301",
        "ﬁ ﬀ ²", "Ångström", "ÅNGSTRÖM", "ß ẞ", "漢字かなカナ한국어", "مرحبا", "नमस्ते", "👩‍👩‍👧 😀",
        "\u00a0\u200b\ufeff", "\x00\x07", "▁a▁▁b", "Ġa", "##ing", "<0x0A>",
        "def f(x):\n    return x ** 2  # ok\n", "{\"a\": [1, 2]}", "http://a.b/c?d=e&f",
        "Hello, world!", "...!?--", "(a)[b]",
    ]  # fmt: skip
    added = [token.content for token in tokenizer._tokenizer.get_added_tokens_decoder().values()]
    vocab = tokenizer._tokenizer.get_vocab(with_added_tokens=False)
    pieces = sorted(vocab)[:: max(len(vocab) // count, 1)]
    inside = [f"a{token} b {token}c" for token in added[:64]]
    return words + inside + pieces + [f"x {piece}y" for piece in pieces]


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def _write(target: Path, text: str) -> None:
    if target.exists():
        target.unlink()
    with new_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def check_ids(
    ids: Iterable[int], rows: int, where: str, tokenizer: Tokenizer | None = None
) -> None:
    """Raise UserError for an id without an embedding: the vocabulary may be larger than the model,
    but the text must not use the surplus. rows: number of embeddings."""
    if (largest := max(ids, default=-1)) >= rows:
        token = f"{tokenizer.token_of(largest)!r} has id" if tokenizer else "holds token"
        raise UserError(
            f"{where}: {token} {largest}, but the model has only {rows} embeddings; remove that"
            " token from the text, or resize the model's embeddings"
        )
