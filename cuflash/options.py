"""Options that steer how a problem is answered, never what is answered."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.errors import InvalidTypeError, InvalidValueError
from cuflash.plan.config import MAX_SPLITS, BackwardConfig, ForwardConfig


@dataclass(frozen=True)
class Options:
    """How to run an attention call on a GPU (real or emulated).

    Parameters
    ----------
    num_splits : int, optional
        Into how many parts the keys of one query tile are split, 1 to 128. None lets the plan choose: one
        when the query tiles alone fill the device. A fixed number gives the same bits for a query
        whatever else is in the batch.
    config : ForwardConfig, optional
        Explicit kernel configuration; None lets the plan choose. The fields that follow from the
        problem (dtype, head dims, bias, ...) must agree with it.
    precision : str, optional
        None: float32 is accurate to float32. "tf32", of float32 inputs alone: products see their first 11 significant
        bits, in a third of the matrix instructions; sums stay in float32.
    deterministic : bool
        Gradients have the same bits every time: key tiles add to dq in a fixed order. If False, in the order in which
        they come, and the last bits of dq may vary: on an H200 in 8 to 14 % less time at 16,384 tokens and 16 heads or
        more, in up to 27 % less where there are fewer. On the CPU gradients never vary.
    backward_config : BackwardConfig, optional
        The same for the kernels that a pullback of `vjp` launches.
    """

    num_splits: int | None = None
    config: ForwardConfig | None = None
    precision: str | None = None
    deterministic: bool = True
    backward_config: BackwardConfig | None = None

    def __post_init__(self) -> None:
        if self.num_splits is not None:
            if isinstance(self.num_splits, bool) or not isinstance(self.num_splits, int):
                raise InvalidTypeError(f"options.num_splits = {self.num_splits!r}: must be an int or None")
            if not 1 <= self.num_splits <= MAX_SPLITS:
                raise InvalidValueError(f"options.num_splits = {self.num_splits}: must be 1 to {MAX_SPLITS}")
        if self.config is not None and not isinstance(self.config, ForwardConfig):
            raise InvalidTypeError(f"options.config = {self.config!r}: must be a ForwardConfig or None")
        if self.precision is not None and not isinstance(self.precision, str):
            raise InvalidTypeError(f"options.precision = {self.precision!r}: must be a str or None")
        if self.precision not in (None, "tf32"):
            raise InvalidValueError(f"options.precision = {self.precision!r}: must be 'tf32' or None")
        if not isinstance(self.deterministic, bool):
            raise InvalidTypeError(f"options.deterministic = {self.deterministic!r}: must be True or False")
        given = self.backward_config
        if given is not None and type(given) is not BackwardConfig:
            raise InvalidTypeError(f"options.backward_config = {given!r}: must be a BackwardConfig or None")
