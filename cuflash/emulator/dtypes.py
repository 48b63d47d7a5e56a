"""NumPy types and ufuncs under the names that translated code uses."""

from __future__ import annotations

import numpy as np

U1, U2, U4, U8 = (np.dtype(f"u{w}") for w in (1, 2, 4, 8))
I1, I2, I4, I8 = (np.dtype(f"i{w}") for w in (1, 2, 4, 8))
F2, F4, F8 = (np.dtype(f"f{w}") for w in (2, 4, 8))

minimum, maximum = np.minimum, np.maximum
sqrt, exp2, log2, tanh, sin, cos, copysign = np.sqrt, np.exp2, np.log2, np.tanh, np.sin, np.cos, np.copysign
isnan, isinf, isfinite, rint, trunc, floor, ceil = np.isnan, np.isinf, np.isfinite, np.rint, np.trunc, np.floor, np.ceil


def choose(condition: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first where the condition holds, else second."""
    if np.ndim(condition) == 0:
        return first if condition else second
    return np.where(condition, first, second)
