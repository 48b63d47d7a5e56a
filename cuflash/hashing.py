"""`sparse.angular_hash`: whole numbers that are likelier equal the closer two vectors are in direction."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from cuflash import check
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.reference.arrays import cast, namespace


def angular_hash(x: Any, num_buckets: int, *, seed: int = 0, projections: Any = None) -> Any:
    """Hashes that are likelier equal the smaller the angle between two vectors is: argmax of [x R, -x R].

    Cross-polytope hashing (Andoni et al. 2015) as SCFA and Reformer use it: the columns of R are random directions.

    Parameters
    ----------
    x : array (..., head_dim)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX.
    num_buckets : int
        How many hashes there are, even and at least 2.
    seed : int
        Of the random directions: the same ones for queries and keys of a head dimension.
    projections : array (head_dim, num_buckets // 2), optional
        R itself, of x's kind, in place of random directions. On a GPU it spares their copy from the host in every call.

    Returns
    -------
    hashes : array (...)
        int32, 0 to num_buckets - 1, of x's kind, on its device.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError
        An argument is not what this page says.
    """
    for argument, value in (("num_buckets", num_buckets), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InvalidTypeError(f"{argument} = {value!r}: must be an integer")
    if num_buckets < 2 or num_buckets % 2:
        raise InvalidValueError(f"num_buckets = {num_buckets}: must be even and at least 2")
    if seed < 0:
        raise InvalidValueError(f"seed = {seed}: must be >= 0")
    xp: Any = namespace(x=x)
    name = str(x.dtype).removeprefix("torch.")
    if name not in check.DTYPE_NAMES.values():
        raise InvalidDtypeError(f"x.dtype = {name}: must be one of {', '.join(check.DTYPE_NAMES.values())}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InvalidShapeError(f"x.shape = {tuple(x.shape)}: must be (..., head_dim)")
    shape = int(x.shape[-1]), int(num_buckets) // 2
    if projections is None:
        device = {"device": x.device} if xp.__name__ == "torch" else {}
        projections = xp.asarray(_directions(*shape, seed), **device)
    elif tuple(projections.shape) != shape:
        raise InvalidShapeError(f"projections.shape = {tuple(projections.shape)}: must be {shape}")
    dtype = xp.float64 if name == "float64" else xp.float32
    scores = xp.matmul(cast(x, dtype), cast(projections, dtype))
    return cast(xp.argmax(xp.concatenate((scores, -scores), -1), -1), xp.int32)


@lru_cache(maxsize=32)
def _directions(head_dim: int, count: int, seed: int) -> np.ndarray:
    """Random unit vectors (head_dim, count), float64."""
    columns = np.random.default_rng(seed).standard_normal((head_dim, count))
    return columns / np.linalg.norm(columns, axis=0)
