"""Read a directory's files as one tokenizer: tokenizer.json, a sentencepiece tokenizer.model or
vocab.json with merges.txt, and their companions (tokenizer_config.json, special_tokens_map.json,
added_tokens.json, chat templates), as transformers 5.23 reads them.

transformers does not use every tokenizer.json as it is: classes such as LlamaTokenizer keep its
vocabulary, merges and post-processor, and rebuild the rest from the flags in tokenizer_config.json.
Models were trained with the resulting ids, so the same is done here.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers, processors

from btx_jax.data import sentencepiece_models
from btx_jax.data.sentencepiece_models import SPACE
from btx_jax.data.tokenizer_classes import AS_IT_IS, CLASSES, class_of
from btx_jax.errors import UserError

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a directory of NAME.jinja
NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Files:
    """The contents of a tokenizer's files.

    backend: the whole pipeline. named: role such as `bos_token` -> the token, also for templates.
    templates: name -> chat template; a single one is named "default". cleans_up: whether spaces
    before punctuation are removed from decoded text. verbatim: whether backend is exactly
    tokenizer.json, which no class of transformers would change.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    templates: Mapping[str, str]
    cleans_up: bool = False
    verbatim: bool = False


def read_files(file: Path) -> Files:
    """Read a tokenizer file and its companions. Raises UserError for a damaged one."""
    folder = file.parent
    companions = file.suffix == ".json" or file.name in NAMES
    config = read_json(folder / CONFIG) if companions else {}
    try:
        if file.suffix == ".model" and not (companions and (folder / CONFIG).is_file()):
            return _sentencepiece_alone(file, _templates(folder, {}) if companions else {})
        return _Reading(file, config).files()
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{folder / CONFIG}: damaged: {type(error).__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} when there is no such file. Raises UserError when it is
    damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged: {type(values).__name__}, not a JSON object")
    return values


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.json. Truncation and padding are turned off: they are meant for a
    classifier's batches, and text must never be truncated silently."""
    made = _whole(path, lambda: tokenizers.Tokenizer.from_file(str(path)))
    made.no_truncation()
    made.no_padding()
    return made


def _whole(path: Path, make: Callable[[], tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """Call make. Raises UserError when the library cannot load the file: it raises bare Exception,
    and panics as BaseException."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from error


def frame(backend: tokenizers.Tokenizer, before: list[str], behind: list[str]) -> None:
    """Make the tokenizer add these special tokens around every text."""
    told = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *behind])]
    around = [f"{token}:0" for token in before], [f"{token}:0" for token in behind]
    single: list[str] = [*around[0], "$A:0", *around[1]]
    pair = [*single, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in behind)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=told
    )


def _sentencepiece_alone(file: Path, templates: Mapping[str, str]) -> Files:
    """Read a .model that has no tokenizer_config.json and so is self-contained. BOS is added in
    front of every text."""
    proto = sentencepiece_models.read_model(file)
    backend = sentencepiece_models.pipeline(proto)
    named = _named_by_model(proto)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in named.values()])
    if "bos_token" in named:
        frame(backend, [named["bos_token"]], [])
    return Files(backend, named, templates)


def _named_by_model(proto: Any) -> dict[str, str]:
    trainer = proto.trainer_spec
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return {role: proto.pieces[i].piece for role, i in ids.items() if 0 <= i < len(proto.pieces)}


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates. Files take precedence over entries of tokenizer_config.json, as in
    transformers."""
    found = {}
    try:
        if (folder / TEMPLATE).is_file():
            found["default"] = (folder / TEMPLATE).read_text(encoding="utf-8")
        for path in sorted((folder / TEMPLATES).glob("*.jinja")):
            found[path.name.removesuffix(".jinja")] = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its chat template cannot be read: {error}") from error
    if found:
        return found
    told = config.get("chat_template")
    if isinstance(told, str):
        return {"default": told}
    if isinstance(told, list):
        told = {entry["name"]: entry["template"] for entry in told}
    return dict(told or {})


class _Reading:
    """Reads one directory's files, in the order in which transformers applies them."""

    def __init__(self, file: Path, config: Mapping[str, Any]):
        self.file, self.config = file, dict(config)
        self.read: tokenizers.Tokenizer | None = None
        self.spec: dict[str, Any] = {}
        self.further_roles: list[str] = []  # names that the files give to tokens, such as "image"
        if file.suffix == ".json" and file.name != "vocab.json":
            self.read = load_backend(file)
            self.spec = read_json(file)
            # tokenizer.json's post-processor takes precedence over these.
            self.config.pop("add_bos_token", None)
            self.config.pop("add_eos_token", None)
        model = read_json(file.parent / "config.json")
        declared = self.config.get("tokenizer_class") or model.get("tokenizer_class") or ""
        self.name = class_of(
            str(model.get("model_type") or ""),
            str(declared).removesuffix("Fast"),
            '"ByteLevel"' in json.dumps(self.spec),
        )
        if self.name not in CLASSES and self.name not in AS_IT_IS:
            log.warning(
                "%s: unknown tokenizer_class %s; %s is used unchanged",
                file.parent, self.name, file.name,
            )  # fmt: skip
        self.recipe = CLASSES.get(self.name)

    def files(self) -> Files:
        values = self._values()
        decoder_of_added = self._added(values)
        if self.file.suffix == ".json" and not values.get("extra_special_tokens"):
            values["extra_special_tokens"] = values.pop("additional_special_tokens", None)
        backend, extra = self._backend(values)
        named = self._named(values, {token.content: token for token in decoder_of_added.values()})
        tokens = self._to_add(backend, decoder_of_added, named, extra)
        before = backend.get_vocab_size(with_added_tokens=True)
        if tokens:
            backend.add_tokens(tokens)
        texts = {role: str(token) for role, token in named.items()}
        self._set_frame(backend, values, texts)
        if values.get("split_special_tokens"):
            backend.encode_special_tokens = True
        verbatim = self.read is backend and backend.get_vocab_size() == before and not tokens
        return Files(
            backend,
            texts,
            _templates(self.file.parent, self.config),
            bool(values.get("clean_up_tokenization_spaces")) and not _is_bpe(backend),
            verbatim and self.name in AS_IT_IS and not values.get("split_special_tokens"),
        )

    def _values(self) -> dict[str, Any]:
        """tokenizer_config.json, overridden by special_tokens_map.json where it has no
        added_tokens_decoder, as before transformers 4.34."""
        values = self.config
        if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
            values["extra_special_tokens"] = values.pop("additional_special_tokens")
        if isinstance(values.get("extra_special_tokens"), dict):
            self.further_roles = list(values["extra_special_tokens"])
            values |= values.pop("extra_special_tokens")
        if "added_tokens_decoder" not in values:
            for key, value in read_json(self.file.parent / SPECIAL_MAP).items():
                values[key] = (
                    _added_token(value, special=True) if isinstance(value, dict) else value
                )
        return values

    def _added(self, values: Mapping[str, Any]) -> dict[int, AddedToken]:
        if "added_tokens_decoder" in values:
            told = values["added_tokens_decoder"]
            return {int(i): _added_token(token) for i, token in told.items()}
        found: dict[int, AddedToken] = {}
        special = {str(_token(values[role])) for role in ROLES if values.get(role)}
        special |= {str(_token(token)) for token in values.get("extra_special_tokens") or ()}
        for text, i in read_json(self.file.parent / ADDED).items():
            found[int(i)] = AddedToken(
                text, normalized=text not in special, special=text in special
            )
        for entry in self.spec.get("added_tokens") or ():
            entry = dict(entry)
            found[int(entry.pop("id"))] = _added_token(entry)
        return found

    def _backend(self, values: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, list[Any]]:
        """(the pipeline before tokens are added, further special tokens to add)."""
        extra = list(values.get("extra_special_tokens") or ())
        if self.read is not None:
            if self.recipe is None:
                return self.read, extra
            vocab, merges = _vocabulary(self.spec)
            made = self.recipe.build(vocab, merges, values)
            made.post_processor = self.read.post_processor
            return made, extra
        if self.file.name == "vocab.json":
            if self.recipe is None:
                raise UserError(
                    f"{self.file}: tokenizer_class {self.name or 'none'} does not say how to read"
                    " vocab.json and merges.txt; save the tokenizer as tokenizer.json"
                )
            merges_file = self.file.parent / "merges.txt"
            try:
                lines = merges_file.read_text(encoding="utf-8").splitlines()
            except ValueError as error:
                raise UserError(f"{merges_file}: damaged: {error}") from error
            merges = [
                _pair(line) for line in lines if line.strip() and not line.startswith("#version")
            ]
            vocab, build = read_json(self.file), self.recipe.build
            return _whole(self.file, lambda: build(vocab, merges, values)), extra
        proto = sentencepiece_models.read_model(self.file)
        if "extra_special_tokens" not in values:
            extra = sentencepiece_models.added_pieces(proto)
        vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        by_id = lambda piece: vocab[piece]  # noqa: E731
        if self.recipe is not None:
            merges = sentencepiece_models.merges_of(vocab, vocab, by_id)
            return self.recipe.build(vocab, merges, values), extra
        return _from_model(proto, vocab, by_id, self._added(values)), extra

    def _named(
        self, values: Mapping[str, Any], added: Mapping[str, AddedToken]
    ) -> dict[str, str | AddedToken]:
        defaults: dict[str, Any] = dict(self.recipe.named) if self.recipe else {}
        if self.recipe is None and self.file.suffix == ".model":
            defaults = _named_by_model(sentencepiece_models.read_model(self.file))
        told = {**defaults, **values}
        further = [key for key in told if key.endswith("_token") or key in self.further_roles]
        roles = [role for role in dict.fromkeys([*ROLES, *further]) if role in told]
        named: dict[str, str | AddedToken] = {}
        for role in roles:
            value = values[role] if role in values else defaults[role]
            if isinstance(value, bool) or not isinstance(value, str | dict | AddedToken):
                continue  # add_bos_token and other flags; null means none
            token = _token(value)
            named[role] = added.get(str(token), token)
        return named

    def _to_add(
        self,
        backend: tokenizers.Tokenizer,
        added: Mapping[int, AddedToken],
        named: Mapping[str, str | AddedToken],
        extra: list[Any],
    ) -> list[AddedToken]:
        """Tokens to add, in the order of their ids; those that the pipeline already has with the
        same flags are skipped."""
        there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        tokens: list[str | AddedToken] = [
            token for _, token in sorted(added.items()) if repr(token) not in there
        ]
        texts = [str(t.content) for t in backend.get_added_tokens_decoder().values()]
        texts += [_content(token) for token in tokens]
        for token in [*named.values(), *map(_token, extra)]:
            if _content(token) not in texts and token not in tokens:
                tokens.append(token)
        names = {_content(token) for token in named.values()}
        made = []
        for token in tokens:
            if isinstance(token, str):
                token = AddedToken(token, special=True)
            elif not token.special and token.content in names:
                token.special = True
            made.append(token)
        if self.name == "Qwen2Tokenizer":
            every = [*named.values(), *map(_token, extra)]
            made += [AddedToken(_content(token), special=True) for token in every]
        return made

    def _set_frame(
        self, backend: tokenizers.Tokenizer, values: Mapping[str, Any], named: Mapping[str, str]
    ) -> None:
        recipe = self.recipe
        adds_bos = values.get("add_bos_token", recipe.adds_bos if recipe else None)
        explicit = adds_bos is not None or "add_eos_token" in values
        if explicit or backend.post_processor is None or (recipe and recipe.updates_frame):
            bos = [named["bos_token"]] if adds_bos and "bos_token" in named else []
            ends = values.get("add_eos_token") and "eos_token" in named
            frame(backend, bos, [named["eos_token"]] if ends else [])


def _from_model(
    proto: Any, vocab: dict[str, int], rank: Any, added: Mapping[int, AddedToken]
) -> tokenizers.Tokenizer:
    """The pipeline that transformers makes from a .model of an unknown class: it adds no space in
    front, whatever the model says, and placeholders get the names of added tokens."""
    trainer = proto.trainer_spec
    pieces = {i: piece for piece, i in vocab.items()}
    merges = sentencepiece_models.merges_of(vocab, vocab, rank)
    for i, token in added.items():
        if pieces.get(i) not in (None, token.content) and token.content not in vocab:
            vocab[token.content] = vocab.pop(pieces[i])
            pieces[i] = token.content
    model: Any
    if trainer.model_type == sentencepiece_models.UNIGRAM:
        model = models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    made = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = sentencepiece_models.decoder(False, trainer.byte_fallback)
    return made


def _vocabulary(spec: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # unigram models: pieces with scores
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    return vocab, [_pair(merge) for merge in model.get("merges") or ()]


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as a pair: old files write "a b", new ones ["a", "b"]."""
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b


def _is_bpe(backend: tokenizers.Tokenizer) -> bool:
    return isinstance(backend.model, models.BPE)


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content


def _token(value: Any) -> str | AddedToken:
    return _added_token(value, special=True) if isinstance(value, dict) else value


def _added_token(values: Any, **more: Any) -> AddedToken:
    if isinstance(values, AddedToken):
        return values
    if isinstance(values, str):
        return AddedToken(values, **more)
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    given = {key: values[key] for key in known if key in values} | more
    return AddedToken(given.pop("content"), **given)
