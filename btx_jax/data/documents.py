"""Documents as tokens, and packing of tokens into rows of fixed length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from btx_jax.data.instructions import Piece, encode_pieces
from btx_jax.data.tokenizers import Tokenizer


class Document(NamedTuple):
    """A tokenised document.

    ids: its tokens. bytes: UTF-8 length of the learnt text, without end-of-text tokens written out
    in it, whose losses do not count in bits per byte. learnt: for each token, whether it is a
    target; None for all. is_chat: whether a chat template rendered it; templates write the tokens
    at the beginning of a text themselves.
    """

    ids: list[int]
    bytes: int
    learnt: list[bool] | None = None
    is_chat: bool = False


class Columns(NamedTuple):
    """Concatenated documents. For each token: its id, the number of bytes of text it represents,
    and 1 if it is learnt, else -1. For each document: its number of tokens."""

    tokens: np.ndarray
    sizes: np.ndarray
    signs: np.ndarray
    lengths: np.ndarray


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text: the decision is the same in every run,
    whatever its source and however often it occurs."""
    return order(text) < fraction * 2**64


def order(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def columns(documents: Iterable[Document], tokenizer: Tokenizer) -> Columns:
    """Concatenate documents. Each starts with the tokens that the tokenizer itself puts there
    (`Tokenizer.prefix`; none for chats) and ends with EOS, if there is one, unless its text already
    does. A document's bytes are spread evenly over its learnt tokens, except EOS."""
    after = [tokenizer.eos] if tokenizer.eos is not None else []
    eos = -1 if tokenizer.eos is None else tokenizer.eos
    tokens, sizes, signs = ([np.zeros(0, kind)] for kind in (np.int32, np.int32, np.int8))
    lengths = []
    for ids, text_bytes, learnt, is_chat in documents:
        before = [] if is_chat else tokenizer.prefix
        whole = [*before, *ids, *([] if _ends_itself(ids, tokenizer, is_chat) else after)]
        row = np.array(whole, np.int32)
        at = slice(len(before), len(before) + len(ids))
        sign = np.ones(len(row), np.int8)
        if learnt is not None:
            sign[at] = np.where(learnt, 1, -1)
        counted = (row[at] != eos) & (sign[at] > 0)
        count = int(counted.sum())
        size = np.zeros(len(row), np.int32)
        size[at][counted] = np.diff(np.arange(count + 1) * text_bytes // max(count, 1))
        for column, part in ((tokens, row), (sizes, size), (signs, sign)):
            column.append(part)
        lengths.append(len(row))
    return Columns(
        np.concatenate(tokens),
        np.concatenate(sizes),
        np.concatenate(signs),
        np.array(lengths, np.int64),
    )


def pack(
    documents: Iterable[Document], tokenizer: Tokenizer, sequence_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Pack documents into rows {tokens, segments, bytes}; see `rows`."""
    return rows((columns([document], tokenizer) for document in documents), sequence_length)


def rows(parts: Iterable[Columns], sequence_length: int) -> Iterator[dict[str, np.ndarray]]:
    """Pack documents into rows {tokens, segments, bytes}.

    Each document gets the next segment number of its row, from 1; the last row is padded with
    segment 0. Tokens that are read but not learnt, such as a prompt's, have a negative segment
    number. bytes: size of the text whose tokens are targets in the row; its sum over all rows is
    the size of the whole text.
    """
    width, number = sequence_length + 1, 0
    left = [np.zeros(0, np.int64) for _ in range(4)]  # tokens, documents, sizes, signs
    for tokens, sizes, signs, lengths in parts:
        document = np.repeat(np.arange(number, number + len(lengths)), lengths)
        number += len(lengths)
        more = (tokens, document, sizes, signs)
        left = [np.concatenate(pair) for pair in zip(left, more, strict=True)]
        count = max(0, (len(left[0]) - width) // sequence_length + 1)
        if count:
            yield from _rows(left, count, sequence_length)
        left = [column[count * sequence_length :] for column in left]
    if len(left[0]) > 1:
        row = next(_rows(left, 1, len(left[0]) - 1))
        padding = (0, width - len(left[0]))
        yield {key: np.pad(v, padding) if v.ndim else v for key, v in row.items()}


def _rows(
    left: Sequence[np.ndarray], count: int, sequence_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """The first `count` rows of the remaining columns, without padding."""
    width = sequence_length + 1
    ends = slice((count - 1) * sequence_length + width)
    tokens, document, sizes, signs = (
        np.lib.stride_tricks.sliding_window_view(column[ends], width)[::sequence_length]
        for column in left
    )
    segments = ((document - document[:, :1] + 1) * signs).astype(np.int32)
    is_target = (document[:, 1:] == document[:, :-1]) & (signs[:, 1:] > 0)
    size = (sizes[:, 1:] * is_target).sum(axis=1)
    for number in range(count):
        yield {
            "tokens": tokens[number].astype(np.int32),
            "segments": segments[number],
            "bytes": np.array(size[number], np.int32),
        }


def _ends_itself(ids: list[int], tokenizer: Tokenizer, is_chat: bool) -> bool:
    """Whether EOS is already the last token, ignoring whitespace; for a chat, any special token, as
    templates end turns with one."""
    ends = tokenizer.special_ids if is_chat else {tokenizer.eos}
    last = ids[-1:] if ids[-1:] and ids[-1] in ends else ids[-2:-1]
    return bool(last) and last[0] in ends and not tokenizer.decode(ids[-1:]).strip()


def _bytes(text: str, ids: list[int], tokenizer: Tokenizer) -> int:
    """Bytes of the text in UTF-8, without end-of-text tokens that are written out in it."""
    ends = 0 if tokenizer.eos is None else ids.count(tokenizer.eos)
    return len(text.encode("utf-8")) - (ends and ends * len(tokenizer.eos_text.encode("utf-8")))


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """Tokenise a text. Raises NotUnicode for a lone surrogate, which JSON can contain and UTF-8
    cannot."""
    ids = tokenizer.encode(text)
    return Document(ids, _bytes(text, ids, tokenizer))


def formatted_document(
    pieces: list[Piece], tokenizer: Tokenizer, cutoff: int, is_chat: bool = False
) -> Document | None:
    """Tokenise formatted pieces, truncated to `cutoff` tokens; None when no answer is left. Raises
    NotUnicode as text_document does."""
    ids, learnt = encode_pieces(pieces, tokenizer)
    answers = "".join(piece.text for piece in pieces if piece.learnt)
    size = _bytes(
        answers, [i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt], tokenizer
    )
    if len(ids) > cutoff:
        size = size * sum(learnt[:cutoff]) // max(sum(learnt), 1)
        ids, learnt = ids[:cutoff], learnt[:cutoff]
    return Document(ids, size, learnt, is_chat) if any(learnt) else None
