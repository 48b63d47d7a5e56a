"""What a program consists of, and where it is evaluated."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuflash.masks.expression import Kind, variable


class Step(NamedTuple):
    """An operation on the values of earlier steps; `value` is a variable's name, a table's or constant's number."""

    operation: str
    kind: Kind
    arguments: tuple[int, ...]
    value: Any


class Lengths(NamedTuple):
    """Upper bounds of a problem's axes; total_q and total_k are None unless it is packed."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    total_q: int | None = None
    total_k: int | None = None

    @property
    def packed(self) -> bool:
        return self.total_q is not None


class Indices(NamedTuple):
    """Arrays of whole numbers that broadcast together, or the expressions that stand for them."""

    batch: Any
    head: Any
    kv_head: Any
    q: Any
    k: Any
    len_q: Any
    len_k: Any
    q_token: Any
    k_token: Any

    @property
    def position(self) -> Any:
        """That of the query among the keys: the last query is at the last key."""
        return self.q + (self.len_k - self.len_q)

    @property
    def distance(self) -> Any:
        """From the query to the key, negative to earlier ones."""
        return self.k - self.position


class Place(NamedTuple):
    """One head of one sequence, or arrays of heads and batch entries that broadcast.

    q_start and k_start are the sequence's first tokens in a packed problem.
    """

    len_q: int
    len_k: int
    batch: Any = 0
    head: Any = 0
    kv_head: Any = 0
    q_start: int = 0
    k_start: int = 0

    def indices(self, q: Any, k: Any) -> Indices:
        """Those of queries q and keys k of the sequence, arrays that broadcast together."""
        return Indices(
            self.batch, self.head, self.kv_head, q, k, self.len_q, self.len_k, q + self.q_start, k + self.k_start
        )


VARIABLES = Indices(*map(variable, Indices._fields))
