"""Merge N models' versions of one tensor, in numpy, for streaming mixes. Pure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from btx_jax.config.merges import MERGE_SETTINGS, REGMEAN
from btx_jax.mixing.regmean import regmean, weighted_rows

_STEP = (
    1 << 16
    # Elements processed at a time: the accumulator stays in a core's cache, and memory does not
    # grow with the tensor.
)
_ROWS = 2048  # rows of a tensor solved at a time, in float64
_LEAST_NORM, _PARALLEL = 1e-8, 0.9995  # as in mergekit: below is zero; |cosine| above is parallel


def wide(array: np.ndarray) -> np.ndarray:
    """The array in float32, exactly. bfloat16 is converted bitwise, several times faster than a
    cast."""
    if array.dtype.name == "bfloat16":
        bits = array.view(np.uint16).astype(np.uint32)
        bits <<= 16  # in place: a second array of the chunk's size would not fit in the cache
        return bits.view(np.float32)
    return array.astype(np.float32)  # always a copy, since callers add into it


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, start + _STEP) for start in range(0, size, _STEP))


def mean(tensors: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Unweighted mean, summed in float32 (float64 if any tensor is float32) and rounded once to
    dtype."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    result = np.empty(flat[0].shape, dtype)
    accumulator = (
        np.float64 if any(tensor.dtype == np.float32 for tensor in tensors) else np.float32
    )
    for part in _parts(result.size):
        total = wide(flat[0][part]).astype(accumulator, copy=False)
        for tensor in flat[1:]:
            np.add(total, wide(tensor[part]), out=total)
        result[part] = np.divide(total, len(flat), dtype=accumulator).astype(dtype)
    return result.reshape(tensors[0].shape)


def ties(
    base: np.ndarray, tensors: Sequence[np.ndarray], density: float, dtype: np.dtype
) -> np.ndarray:
    """TIES-Merging (arXiv 2306.01708, algorithm 1, lambda = 1): keep the `density` largest changes
    from base by magnitude, elect for each element the sign with the larger total, and add the mean
    of the changes with that sign."""
    base32 = wide(base)
    keep = max(1, round(density * base.size))
    total = np.zeros_like(base32)
    changes = []
    for tensor in tensors:
        change = wide(tensor) - base32
        if keep < change.size:
            threshold = np.partition(np.abs(change).reshape(-1), change.size - keep)[
                change.size - keep
            ]
            change[np.abs(change) < threshold] = 0
        changes.append(change)
        total += change
    sign = np.sign(total)
    total[:] = 0
    count = np.zeros_like(base32)
    for change in changes:
        agrees = (np.sign(change) == sign) & (change != 0)
        total += np.where(agrees, change, 0)
        count += agrees
    return (base32 + total / np.maximum(count, 1)).astype(dtype)


def dare(
    base: np.ndarray,
    tensors: Sequence[np.ndarray],
    density: float,
    dtype: np.dtype,
    rng: np.random.Generator,
) -> np.ndarray:
    """DARE (arXiv 2311.03099): drop each change from base with probability 1 - density, divide the
    rest by density, and add the mean over models to base."""
    base32 = wide(base)
    total = np.zeros_like(base32)
    for tensor in tensors:
        kept = rng.random(base.shape, np.float32) < density
        total += np.where(kept, (wide(tensor) - base32) / density, 0)
    return (base32 + total / len(tensors)).astype(dtype)


def task_arithmetic(
    base: np.ndarray, tensors: Sequence[np.ndarray], scale: float, dtype: np.dtype
) -> np.ndarray:
    """Task arithmetic (arXiv 2212.04089): base plus scale times the sum of changes from it, in
    float64. The same as mergekit's with all weights 1 and lambda = scale."""
    base_flat, flat = base.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    result = np.empty(base_flat.shape, dtype)
    for part in _parts(result.size):
        start = wide(base_flat[part]).astype(np.float64)
        total = np.zeros_like(start)
        for tensor in flat:
            total += wide(tensor[part]) - start
        result[part] = (start + scale * total).astype(dtype)
    return result.reshape(base.shape)


def slerp(tensors: Sequence[np.ndarray], t: float, dtype: np.dtype) -> np.ndarray:
    """Spherical interpolation, as in mergekit: from the first tensor (t = 0) to the second (t = 1)
    at a constant angular rate, each tensor taken as one vector; linear where the two are nearly
    parallel or opposite. In float64. A single tensor is returned unchanged."""
    if len(tensors) == 1:
        return tensors[0].astype(dtype)
    first, second = (tensor.reshape(-1) for tensor in tensors)
    squares, product = np.zeros(2), 0.0
    for part in _parts(first.size):
        a, b = (wide(tensor[part]).astype(np.float64) for tensor in (first, second))
        squares += np.sum(a * a), np.sum(b * b)
        product += np.sum(a * b)
    lengths = [length if length > _LEAST_NORM else 1.0 for length in np.sqrt(squares)]
    weights = _slerp_weights(product / (lengths[0] * lengths[1]), t)
    result = np.empty(first.shape, dtype)
    for part in _parts(first.size):
        a, b = (wide(tensor[part]).astype(np.float64) for tensor in (first, second))
        result[part] = (weights[0] * a + weights[1] * b).astype(dtype)
    return result.reshape(tensors[0].shape)


def _slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    if not abs(cosine) <= _PARALLEL:  # also for NaN, which is reported elsewhere
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def solved(
    tensors: Sequence[np.ndarray], seen: Sequence[np.ndarray], alpha: float, dtype: np.dtype
) -> np.ndarray:
    """RegMean of one tensor [out, in].

    seen: for each model, the sum of x x^T over the inputs of the linear layer, [in, in]; for an
    embedding [tokens, D], how often the model's text contains each token, [tokens].
    """
    result = np.empty(tensors[0].shape, dtype)
    for start in range(0, len(result), _ROWS):
        rows = slice(start, start + _ROWS)
        parts = [wide(tensor[rows]) for tensor in tensors]
        if seen[0].ndim == 1:
            result[rows] = weighted_rows(parts, [count[rows] for count in seen])
        else:
            result[rows] = regmean([part.T for part in parts], seen, alpha).T
    return result


def ulp(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between adjacent numbers of dtype at a float64 value."""
    bits, least = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}[dtype.name]
    exponent = np.where(value == 0, least, np.maximum(np.frexp(np.abs(value))[1] - 1, least))
    return np.ldexp(1.0, exponent - bits)


def is_mean(found: np.ndarray, tensors: Sequence[np.ndarray]) -> bool:
    """Whether `found` is the mean of the tensors, within one ulp of its dtype."""
    exact_parts = [wide(tensor).astype(np.float64) for tensor in tensors]
    exact = np.mean(exact_parts, axis=0)
    # float32 sums of 16-bit tensors have their own rounding error where large values cancel.
    is_wide = any(tensor.dtype == np.float32 for tensor in tensors)
    slack = 0.0 if is_wide else len(tensors) * 2.0**-24
    bound = ulp(exact, found.dtype) + slack * np.max(np.abs(exact_parts), axis=0)
    return bool((np.abs(wide(found).astype(np.float64) - exact) <= bound).all())


class Merge(NamedTuple):
    """A merge method.

    make: (base's tensor, models' tensors, dtype, random generator, settings) -> merged tensor. The
    base's tensor is None for methods that do not read it; regmean also takes `seen`, as for
    `solved`. models: number of distinct models required; None for any. is_right: independent check
    of a result; None if verification merges again and compares bit for bit.
    """

    make: Callable[..., np.ndarray]
    models: int | None = None
    is_right: Callable[[np.ndarray, Sequence[np.ndarray]], bool] | None = None


MERGES: Mapping[str, Merge] = {
    "mean": Merge(lambda base, tensors, dtype, rng: mean(tensors, dtype), is_right=is_mean),
    "ties": Merge(lambda base, tensors, dtype, rng, density: ties(base, tensors, density, dtype)),
    "dare": Merge(
        lambda base, tensors, dtype, rng, density: dare(base, tensors, density, dtype, rng)
    ),
    "task_arithmetic": Merge(
        lambda base, tensors, dtype, rng, scale: task_arithmetic(base, tensors, scale, dtype)
    ),
    "slerp": Merge(lambda base, tensors, dtype, rng, t: slerp(tensors, t, dtype), models=2),
    REGMEAN: Merge(
        lambda base, tensors, dtype, rng, alpha, seen=None: (
            mean(tensors, dtype) if seen is None else solved(tensors, seen, alpha, dtype)
        )
    ),
}
assert MERGES.keys() == MERGE_SETTINGS.keys()
