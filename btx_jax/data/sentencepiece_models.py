"""sentencepiece `.model` files: training, and conversion to a pipeline of the tokenizers library,
which finds special tokens within a text as Hugging Face's tokenizers do."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from btx_jax.errors import UserError
from btx_jax.output import new_file
from btx_jax.progress import clock

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # values of trainer_spec.model_type; 3 and 4 are words and characters
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces


def read_model(path: Path) -> Any:
    """The ModelProto of a `.model` file. Raises UserError when it is not a kind that can be
    converted."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
        sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (DecodeError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a sentencepiece model: {str(error).splitlines()[0]}; a tiktoken"
            " file of that name needs the accompanying tokenizer.json"
        ) from error
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(
            f"{path}: a model of words or characters is not supported; use BPE or unigram"
        )
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{path}: treat_whitespace_as_suffix is not supported")
    return proto


def merges_of(pieces: Iterable[str], vocab: dict[str, int], rank: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into one of `pieces`, best first: by rank(piece), with
    transformers' order among ties."""
    found = []
    for piece in pieces:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(rank(piece), len(a), len(b), a, b) for a, b in halves]
    found.sort(key=lambda entry: entry[:3])
    return [(a, b) for *_, a, b in found]


def added_pieces(proto: Any) -> list[AddedToken]:
    """Control symbols, which are special, and user-defined pieces."""
    return [
        AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
        for piece in proto.pieces
        if piece.type in (CONTROL, USER_DEFINED)
    ]


def pipeline(proto: Any) -> tokenizers.Tokenizer:
    """A pipeline that gives sentencepiece's ids for any text without control symbols.

    It follows the flags of a `.model` exactly. transformers follows only some of them, depending on
    the class: see tokenizer_files.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    model: Any
    if trainer.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        score = {piece.piece: piece.score for piece in proto.pieces}
        normal = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
        model = models.BPE(
            vocab=vocab,
            merges=merges_of(normal, vocab, lambda piece: (-score[piece], vocab[piece])),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    made = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    made.decoder = decoder(strips=normalizer.add_dummy_prefix)
    made.add_tokens(added_pieces(proto))
    return made


def decoder(strips: bool, byte_fallback: bool = True) -> decoders.Decoder:
    """Decoder from pieces to text. strips: whether to remove the space that was added in front."""
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps += [decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, target: Path) -> None:
    """Train a byte-fallback BPE that decodes any text exactly: no normalisation, every space kept,
    digits split. Only U+2581, sentencepiece's own sign for a space, comes back as a space. Raises
    UserError when the target exists, or the text does not suit the vocabulary size."""
    if target.exists():
        raise UserError(f"{target} exists; delete it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            clock("training the tokenizer"),
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
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text: {_cause(str(error))}"
        ) from error


def _cause(told: str) -> str:
    """What sentencepiece's messages mean, in the words of btx_jax."""
    if "sentences_.empty()" in told:
        return "it has no documents, or all are empty; give more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", told):
        return f"its characters and all bytes need {least[1]} pieces; raise --vocab-size"
    return told.splitlines()[-1]


def _pieces(texts: Iterable[str], size: int = 4000) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size].replace("\0", "")
