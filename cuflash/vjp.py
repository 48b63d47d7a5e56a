"""`vjp`: a result and its pullback. A public function registers how it is differentiated; this module knows none."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from typing import Any, NamedTuple

from cuflash.errors import (
    DeviceError,
    InvalidDtypeError,
    InvalidShapeError,
    InvalidTypeError,
    InvalidValueError,
    type_name,
)

Pullback = Callable[[Any], tuple[Any, ...]]
Rule = Callable[..., tuple[Any, Pullback]]

_rules: dict[Any, tuple[Rule, Signature]] = {}


def register(function: Callable[..., Any], rule: Rule) -> None:
    """Let `vjp` differentiate `function`.

    `rule` takes what `function` takes and returns its result and the pullback, which may trust that a cotangent has the
    structure, kind, shapes, dtypes and device of the result.
    """
    _rules[function] = rule, signature(function)


def vjp(function: Callable[..., Any], *arrays: Any, **keywords: Any) -> tuple[Any, Pullback]:
    """Call a function of cuflash and prepare its gradient: the vector-Jacobian product, in JAX's convention.

    Parameters
    ----------
    function : callable
        `attention`, `attention_varlen`, `sparse.hash_sparse_attention`, `sparse.qk_sparse_attention`, `merge_states`,
        `reference.standard_attention` or `reference.chunked_attention`.
    arrays : arrays
        What the function takes by position: q, k, v; of `attention_varlen` also cu_seqlens_q and cu_seqlens_k; of
        those of `sparse` two hashes or two truths; of `merge_states` outs and lses.
    keywords
        What the function takes by name. `out` must be None: the pullback keeps the result, which must not change.

    Returns
    -------
    result : array, or pair of arrays
        What the function returns.
    pullback : callable
        Takes a cotangent like `result` (of the same kind of array, shape, dtype and device; a pair if `result` is
        one) and returns the gradients of the float arrays: (dq, dk, dv), with a bias (dq, dk, dv, dbias), of
        `merge_states` (douts, dlses), each of the kind, shape and dtype of what it is a gradient of. The gradient of a
        bias is summed over the axes that it is broadcast over, that of k and v over the query heads that share them. It
        may be called any number of times, and gives the same bits each time unless ``options.deterministic`` is False.

    Raises
    ------
    InvalidTypeError
        `function` has no pullback, does not take these arguments, or a cotangent is of another kind than the result.
    InvalidShapeError, InvalidDtypeError
        A cotangent is not like the result; or heads are too wide for a GPU's shared memory, as some of float64 are.
    DeviceError
        A cotangent is on another device than the result.
    CuflashError
        What the function itself raises. Nothing was computed or written.

    Notes
    -----
    The function runs once. Of it the pullback keeps the arrays themselves, out and lse, and computes the scores again
    tile by tile (FlashAttention-2; Dao 2023), in memory linear in the sequence lengths. Neither the arrays nor the
    result may be changed before its last call. Queries that see no key have the gradient 0, and so have keys that no
    query sees, whatever they hold. Sums are in float32, in float64 for float64.

    On a GPU key tiles add their parts of dq to sums in memory, four bytes an element (of float64 eight), each in its
    turn, so that the bits are the same every time. NaN and infinities of keys and values also reach other queries of a
    tile, as in `attention`. The gradient of a bias computes the scores once more; for a bias that is broadcast along
    both sequences it keeps few multiprocessors busy.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 4, 64))
    >>> out, pullback = cuflash.vjp(cuflash.attention, q, k, v, causal=True)
    >>> dq, dk, dv = pullback(np.ones_like(out))
    >>> bool(np.allclose(dv.sum(0), 100))  # every query hands its whole cotangent to the values
    True
    """
    try:
        known_rule = _rules.get(function)
    except TypeError:  # not hashable
        known_rule = None
    if known_rule is None:
        known = ", ".join(sorted(f.__name__ for f in _rules))
        raise InvalidTypeError(f"function = {function!r}: must be one that has a pullback: {known}")
    rule, parameters = known_rule
    try:
        arguments = parameters.bind(*arrays, **keywords)
    except TypeError as error:
        raise InvalidTypeError(f"vjp of {function.__name__}: {error}") from None
    if arguments.arguments.get("out") is not None:
        raise InvalidValueError(
            "out is given: must be None within vjp, since the pullback keeps the result and no one may write to it"
        )
    arguments.apply_defaults()
    result, pullback = rule(*arguments.args, **arguments.kwargs)
    pair = isinstance(result, tuple)
    expected = [_Like.of(array) for array in (result if pair else (result,))]

    def checked(cotangent: Any) -> tuple[Any, ...]:
        _check(cotangent, pair, expected)
        return pullback(cotangent)

    return result, checked


class _Like(NamedTuple):
    """What a cotangent must be like."""

    package: str
    shape: tuple[int, ...]
    dtype: Any
    device: Any

    @classmethod
    def of(cls, array: Any) -> _Like:
        package = type(array).__module__.partition(".")[0]
        return cls(package, tuple(array.shape), array.dtype, getattr(array, "device", None))


def _check(cotangent: Any, pair: bool, expected: list[_Like]) -> None:
    """A cotangent must be like the result: nothing is computed otherwise."""
    if pair and (not isinstance(cotangent, tuple | list) or len(cotangent) != 2):
        raise InvalidTypeError(f"cotangent is a {type_name(cotangent)}: must be a pair, as the result (out, lse) is")
    names = ("cotangent[0]", "cotangent[1]") if pair else ("cotangent",)
    for name, value, want in zip(names, cotangent if pair else (cotangent,), expected, strict=True):
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise InvalidTypeError(f"{name} is a {type_name(value)}: must be a {want.package} array, as the result is")
        have = _Like.of(value)
        if have.package != want.package:
            raise InvalidTypeError(f"{name} is a {type_name(value)}: must be a {want.package} array, as the result is")
        if have.shape != want.shape:
            raise InvalidShapeError(f"{name}.shape = {have.shape}: must be {want.shape}, that of the result")
        if have.dtype != want.dtype:
            raise InvalidDtypeError(f"{name}.dtype = {have.dtype}: must be {want.dtype}, that of the result")
        if have.device != want.device:
            raise DeviceError(f"{name} is on {have.device}: must be on {want.device}, as the result is")
