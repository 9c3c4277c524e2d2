"""Checks of tensor values in numpy: finiteness, and the range of another dtype."""

import numpy as np

from btx_jax.errors import UserError


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite. Reads the exponent bits only: one pass over the
    bytes."""
    mask = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[array.dtype.name]
    bits: np.ndarray = array.reshape(-1).view(np.uint32 if array.itemsize == 4 else np.uint16)
    step = 1 << 18  # fits a core's cache
    return all(
        int(np.bitwise_and(bits[i : i + step], mask).max(initial=0)) < mask
        for i in range(0, bits.size, step)
    )


def cast(name: object, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast to another storage dtype, rounding to nearest even. Raises UserError on overflow."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if is_finite(array):
        check_range(name, result)
    return result


def check_range(name: object, array: np.ndarray) -> None:
    """Raise UserError when a tensor that was rounded from finite values has an infinite one."""
    if not is_finite(array):
        raise UserError(
            f"{name} holds values beyond {array.dtype.name}'s range; choose bfloat16 or float32"
        )
