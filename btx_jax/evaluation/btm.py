"""Branch-Train-Merge's ensemble weights: which experts speak for a context, and how loud (BTX section 4.2).

The tf-idf vector of a context is compared by cosine with the mean tf-idf vector of each expert's training text; the top-k experts'
cosines, normalised, weigh their output probabilities.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity


class DomainProfiles:
    """documents: expert -> token ids of documents from its training text."""

    def __init__(self, documents: Mapping[str, Sequence[Sequence[int]]]):
        self.experts = tuple(documents)
        self._vectorizer = TfidfVectorizer(analyzer=lambda ids: [str(i) for i in ids])
        self._vectorizer.fit([ids for texts in documents.values() for ids in texts])
        self._means = np.stack([np.asarray(self._vectorizer.transform(texts).mean(axis=0))[0] for texts in documents.values()])

    def weights(self, contexts: Sequence[Sequence[int]], top: int) -> np.ndarray:
        """[contexts, experts]: non-negative, summing to 1, at most `top` of them positive. A context that no expert knows weighs all
        of the first `top` alike. Raises ValueError when top is not between 1 and the number of experts."""
        if not 1 <= top <= len(self.experts):
            raise ValueError(f"top={top}: there are {len(self.experts)} experts")
        cosine = np.clip(cosine_similarity(self._vectorizer.transform(contexts), self._means), 0, None)
        kept = np.zeros_like(cosine)
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :top]
        np.put_along_axis(kept, best, np.take_along_axis(cosine, best, axis=1), axis=1)
        unknown = kept.sum(axis=1) == 0
        kept[unknown, :top] = 1
        return kept / kept.sum(axis=1, keepdims=True)
