"""Read the text of the experts' domains as rows of tokens for a model."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from btx_jax.config.merges import REGMEAN
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.mixture import first_rows, heldout_rows
from btx_jax.data.prepared import PreparedDomain
from btx_jax.data.sources import (
    Problems,
    Source,
    documents,
    expand_files,
    parse_sources,
    source_rows,
)
from btx_jax.data.tokenizers import Tokenizer, check_ids
from btx_jax.errors import UserError
from btx_jax.mixing.recipe import Recipe
from btx_jax.terminal import counted

HELD_OUT = 8  # one token in this many is held out
LENGTH = 512  # tokens per row, unless the model's context is shorter
LEAST = 2 * HELD_OUT  # minimum tokens of a text
COUNTED = 1 << 20  # maximum tokens of a text to count by id

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Documents concatenated and cut into rows. segments: 0 for padding, equal within a row for
    tokens of the same document. is_heldout: tokens that evaluate the routers and are not used for
    fitting."""

    tokens_RT: np.ndarray
    segments_RT: np.ndarray
    is_heldout_RT: np.ndarray

    @property
    def is_used(self) -> np.ndarray:
        """Mask of the tokens used for fitting, [R, T]."""
        return (self.segments_RT > 0) & ~self.is_heldout_RT


def pack(texts: Iterable[Sequence[int]], length: int, limit: int) -> Rows:
    """Pack the first `limit` tokens into rows; the last eighth is held out."""
    ids: list[int] = []
    numbers: list[int] = []  # document number of each token, from 1
    for number, text in enumerate(texts, start=1):
        part = text[: limit - len(ids)]
        ids += part
        numbers += [number] * len(part)
        if len(ids) == limit:
            break
    count = len(ids)
    shape = (-(-count // length), length)
    padding = shape[0] * length - count

    def rows(values: Sequence[int]) -> np.ndarray:
        return np.pad(np.array(values, np.int32), (0, padding)).reshape(shape)

    numbers_RT = rows(numbers)
    segments_RT = np.where(numbers_RT > 0, numbers_RT - numbers_RT[:, :1] + 1, 0)
    places_RT = np.arange(shape[0] * length).reshape(shape)
    is_heldout_RT = (places_RT >= count - count // HELD_OUT) & (segments_RT > 0)
    return Rows(rows(ids), segments_RT.astype(np.int32), is_heldout_RT)


def token_counts(rows: Rows, vocab_size: int) -> np.ndarray:
    """How often each token occurs outside the held-out part, [vocab_size], float64."""
    return np.bincount(rows.tokens_RT[rows.is_used], minlength=vocab_size).astype(np.float64)


def prepared_rows(domains: Sequence[PreparedDomain], limit: int) -> Rows:
    """Rows with about `limit` tokens of prepared domains: an eighth from held-out documents, if
    there are enough of them, the rest from training documents. Domains are sampled by weight."""
    total = sum(domain.weight for domain in domains)
    parts: list[Rows] = []
    for domain in domains:
        share = limit * domain.weight / total
        for first, count, is_heldout in (
            (first_rows, share - share / HELD_OUT, False),
            (heldout_rows, share / HELD_OUT, True),
        ):
            length = max(1, first(domain, 1)["tokens"].shape[1] - 1)
            rows = first(domain, math.ceil(count / length))
            tokens_RT, segments_RT = rows["tokens"][:, :-1], rows["segments"][:, :-1]
            if len(tokens_RT):
                parts.append(Rows(tokens_RT, segments_RT, (segments_RT > 0) & is_heldout))
    return Rows(*map(np.concatenate, zip(*parts, strict=True)))


def expert_texts(
    recipe: Recipe, tokenizer: Tokenizer | None, model: ModelConfig, limit: int
) -> list[Rows]:
    """The first `limit` tokens of each routed expert's text, or of its prompts if it has no text;
    for regmean also of a shared expert's."""
    named = {f"recipe.experts[{i}]": expert for i, expert in enumerate(recipe.experts)}
    if recipe.merge == REGMEAN:
        named |= {f"recipe.shared_experts[{i}]": e for i, e in enumerate(recipe.shared_experts)}
    return [
        read_text(
            expert.text or expert.positive_prompts,
            f"{key}.{'text' if expert.text else 'positive_prompts'}",
            tokenizer,
            model,
            limit,
        )
        for key, expert in named.items()
    ]


def read_text(
    text: str | Sequence[str], key: str, tokenizer: Tokenizer | None, model: ModelConfig, limit: int
) -> Rows:
    """Read the first `limit` tokens of a text. text: `WHAT[#FIELD][:WEIGHT]`, comma-separated, or
    the documents themselves.

    Raises UserError, naming the key, for text that cannot be read, is too short, or contains tokens
    that the model does not have.
    """
    if tokenizer is None:
        raise UserError(f"{key}: cannot be read without a tokenizer, and the model has none")
    if isinstance(text, str):
        found: Iterable[list[int]] = _of_sources(text, key, tokenizer, limit)
    else:
        found = map(tokenizer.encode_prompt, text)
    rows = pack(found, min(LENGTH, model.context), limit)
    if (count := int((rows.segments_RT > 0).sum())) < LEAST:
        raise UserError(
            f"{key}: {counted(count, 'token')} in total; give at least {LEAST}, preferably"
            " thousands"
        )
    check_ids([int(rows.tokens_RT.max())], model.vocab_size, key, tokenizer)
    return rows


def _of_sources(notation: str, key: str, tokenizer: Tokenizer, limit: int) -> Iterator[list[int]]:
    """The first documents of each source, with tokens in proportion to its weight."""
    sources = parse_sources(notation, key)
    total = sum(source.weight for source in sources)
    problems = Problems()
    for source in sources:
        left = -(-limit * source.weight // total)
        for text in _documents(source, key, problems):
            ids = tokenizer.encode_prompt(text)
            yield ids
            left -= len(ids)
            if left <= 0:
                break
    for line in problems.lines():
        log.warning("%s: %s", key, line)


def _documents(source: Source, key: str, problems: Problems) -> Iterator[str]:
    if source.field.startswith("@"):
        raise UserError(
            f"{key}: {source.where}#{source.field}: chats are not supported here; name a field"
        )
    if source.where.startswith("demo:"):
        raise UserError(f"{key}: {source.where}: only supported in configs; name files")
    files = [] if source.where.startswith("tfds:") else expand_files(source, key)
    found = (text for _, text in documents(source_rows(source, files), source.field, problems))
    if (first := next(found, None)) is None:
        raise UserError(f"{key}: {source.where} yields no text: {'; '.join(problems.lines())}")
    return itertools.chain([first], found)
