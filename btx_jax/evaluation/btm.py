"""Branch-Train-Merge: ensembles of dense experts, weighted by how well each knows the context (BTX
section 4.2).

There are two estimates of the weights: the paper's, tf-idf cosine between the context and each
expert's training text; and the Bayes posterior over the experts given the tokens so far (DEMix,
arXiv 2108.05036; BTM, arXiv 2208.03306). An ensemble's loss is that of its mixed *probabilities*.
Everything is computed in numpy from per-token losses: the experts themselves are evaluated one by
one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

BLOCK = 32  # tokens that share tf-idf weights, computed from the preceding tokens of the document
DECAY = 0.3  # weight of the previous prior in an update, as in DEMix


class DomainProfiles:
    """tf-idf profiles of experts. documents: expert -> token ids of documents of its training
    text."""

    def __init__(self, documents: Mapping[str, Sequence[Sequence[int]]]):
        self.experts = tuple(documents)
        self._vectorizer = TfidfVectorizer(analyzer=lambda ids: [str(i) for i in ids])
        self._vectorizer.fit([ids for texts in documents.values() for ids in texts])
        self._means = np.stack(
            [
                np.asarray(self._vectorizer.transform(texts).mean(axis=0))[0]
                for texts in documents.values()
            ]
        )

    def weights(self, contexts: Sequence[Sequence[int]], top: int) -> np.ndarray:
        """Weights [contexts, experts]: non-negative, sum 1, at most `top` positive. A context that
        no expert knows gives all experts equal weight. Raises ValueError when top is not between 1
        and the number of experts."""
        if not 1 <= top <= len(self.experts):
            raise ValueError(f"top={top}: there are {len(self.experts)} experts")
        cosine = np.clip(
            cosine_similarity(self._vectorizer.transform(contexts), self._means), 0, None
        )
        kept = np.zeros_like(cosine)
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :top]
        np.put_along_axis(kept, best, np.take_along_axis(cosine, best, axis=1), axis=1)
        kept[kept.sum(axis=1) == 0] = 1
        return kept / kept.sum(axis=1, keepdims=True)


def tf_idf_weights(
    profiles: DomainProfiles, tokens: np.ndarray, segments: np.ndarray, top: int
) -> np.ndarray:
    """Weights [experts, R, T] of each next token in packed rows [R, T + 1]. Blocks of BLOCK targets
    use the preceding tokens of their document; its first block has none, and gives all experts
    equal weight."""
    rows, width = tokens.shape
    places, contexts = [], []
    for row in range(rows):
        for start, end in documents(segments[row]):
            for block in range(start, end - 1, BLOCK):  # targets block + 1 .. block + BLOCK
                places.append((row, slice(block, min(block + BLOCK, end - 1))))
                contexts.append(tokens[row, start : block + 1].tolist() if block > start else [])
    weights = np.full((len(profiles.experts), rows, width - 1), 1 / len(profiles.experts))
    if contexts:
        for (row, targets), weight in zip(places, profiles.weights(contexts, top), strict=True):
            weights[:, row, targets] = weight[:, None]
    return weights


def bayes_weights(nll: np.ndarray, segments: np.ndarray, updating: bool) -> np.ndarray:
    """Posterior p(expert | document so far), [experts, R, T], for each next token, from its losses
    [experts, R, T].

    A document's prior is uniform or, if updating, the decayed mean of the posteriors at the ends of
    the preceding documents.
    """
    experts = nll.shape[0]
    weights = np.full(nll.shape, 1 / experts)
    prior = np.full(experts, 1 / experts)
    for row in range(nll.shape[1]):
        for start, end in documents(segments[row]):
            losses = nll[:, row, start : end - 1].astype(np.float64)
            if not losses.shape[1]:
                continue
            seen = np.cumsum(losses, axis=1)
            before = np.concatenate([np.zeros((experts, 1)), seen[:, :-1]], axis=1)
            weights[:, row, start : end - 1] = _posterior(prior, before)
            if updating:
                prior = DECAY * prior + (1 - DECAY) * _posterior(prior, seen[:, -1:])[:, 0]
                prior = np.maximum(prior, 1e-6) / np.maximum(prior, 1e-6).sum()
    return weights


def _posterior(prior: np.ndarray, nll: np.ndarray) -> np.ndarray:
    logits = np.log(prior)[:, None] - nll
    return np.exp(logits - np.logaddexp.reduce(logits, axis=0, keepdims=True))


def ensemble_nll(nll: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ensemble loss -log sum_e w_e p_e of each next token. nll, weights: [experts, R, T] -> [R,
    T]."""
    with np.errstate(divide="ignore"):  # log 0 is -inf: an expert with weight 0
        return -np.logaddexp.reduce(np.log(weights) - nll.astype(np.float64), axis=0)


def documents(segments: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each document in a packed row [T + 1]; padding (segment 0) is
    masked."""
    segments = abs(segments)
    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    for start, end in itertools.pairwise(borders):
        if segments[start] > 0:
            yield start, end
