"""Which blocks each sequence holds: the bookkeeping of a cache, without its arrays."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from cuflash.errors import InvalidTypeError, InvalidValueError, OutOfBlocksError, UnknownSequenceError
from cuflash.paging.hashes import block_hash, root_hash
from cuflash.paging.pool import BlockPool

Move = Callable[[list[tuple[int, int]]], None]  # takes (from, to) blocks


class Held:
    """What one sequence holds. Token t lies in blocks[t // block_size]; there are just as many blocks as it takes."""

    __slots__ = ("blocks", "hashes", "length", "on_host", "released", "seq_id", "tokens")

    def __init__(
        self, seq_id: int, blocks: array[int], length: int, tokens: array[int], hashes: list[bytes], released: int = 0
    ) -> None:
        self.seq_id = seq_id
        self.blocks = blocks  # int32; the first `released` ones are 0 and held no more
        self.length = length  # tokens with a slot
        self.tokens = tokens  # int64, the committed ones: those that are known to be written
        self.hashes = hashes  # the root's, then one for each full block of committed tokens
        self.released = released  # blocks that fell out of the window
        self.on_host = False

    @property
    def held(self) -> array[int]:
        return self.blocks[self.released :]


class _Step(NamedTuple):
    """What one sequence of a reservation needs."""

    sequence: Held
    tokens: int  # how many
    new: int  # blocks behind its last one
    written: bool  # whether its last block takes some of the tokens
    copied: bool  # whether that block must be copied first
    first: int  # blocks before this one are out of the window

    @property
    def released(self) -> array[int]:
        return self.sequence.blocks[self.sequence.released : self.first]


class Ledger:
    """Sequences of one pool by their ids, and of a second pool while they are swapped out.

    Every method checks before it changes anything.
    """

    def __init__(self, pool: BlockPool, host_pool: BlockPool, block_size: int, window: int | None, reuse: bool) -> None:
        self.pool, self.host_pool = pool, host_pool
        self.block_size, self.window, self.reuse = block_size, window, reuse
        self.sequences: dict[int, Held] = {}
        self._next_id = 0

    def take(self, seq_ids: Iterable[int]) -> list[Held]:
        """The sequences of these ids, wherever they are."""
        sequences = self.sequences
        try:
            return [sequences[i] for i in seq_ids]
        except KeyError as error:
            raise UnknownSequenceError(f"sequence {error.args[0]!r}: must be one of this cache, not freed") from None
        except TypeError:
            raise InvalidTypeError(f"seq_ids = {seq_ids!r}: must be a sequence of ids") from None

    def present(self, seq_ids: Iterable[int], once: bool = False) -> list[Held]:
        """The sequences of these ids, none of them swapped out, and each but once where a step changes them."""
        taken = self.take(seq_ids)
        for sequence in taken:
            if sequence.on_host:
                raise InvalidValueError(f"sequence {sequence.seq_id} is swapped out: must be swapped in")
        if once:
            _check_once(taken)
        return taken

    def add(self, tokens: array[int], extra: str | bytes | None) -> tuple[int, int]:
        """The id of a sequence that begins with the longest known prefix of `tokens`, and that prefix's length."""
        size, hashes, blocks = self.block_size, [root_hash(extra)] if self.reuse else [], array("i")
        if self.reuse:
            for begin in range(0, len(tokens) - size + 1, size):
                following = block_hash(hashes[-1], tokens[begin : begin + size])
                block = self.pool.find(following)
                if block is None:
                    break
                hashes.append(following)
                blocks.append(block)
        self.pool.incref(blocks)
        length = len(blocks) * size
        return self._enter(blocks, length, tokens[:length], hashes), length

    def _enter(self, *what: Any) -> int:
        seq_id = self._next_id
        self.sequences[seq_id] = Held(seq_id, *what)
        self._next_id += 1
        return seq_id

    def reserve(self, sequences: Sequence[Held], counts: Sequence[int], copy: Move) -> tuple[list[int], int]:
        """Slots for more tokens of each sequence, and how many blocks were copied so that they can be written."""
        writers: dict[int, int] = {}
        steps = [self._step(s, n, writers) for s, n in zip(sequences, counts, strict=True) if n]
        released = [] if self.window is None else [block for step in steps for block in step.released]
        needed = sum([step.new + step.copied for step in steps])
        free = self.pool.num_free + self._freed(released)
        if needed > free:
            raise OutOfBlocksError(f"{needed} blocks are needed: must be at most {free}, the free ones")
        if released:
            self._release(steps, released)
        fresh = self.pool.allocate(needed)
        shared = [step.sequence.blocks[-1] for step in steps if step.copied]
        copies = fresh[: len(shared)]
        _move(self.pool, copy, shared, copies, fresh)
        slots: list[int] = []
        own, more = iter(copies), iter(fresh[len(shared) :])
        for step in steps:
            self._extend(step, own, more, slots)
        if shared:
            self.pool.decref(shared)
        return slots, len(shared)

    def _step(self, sequence: Held, count: int, writers: dict[int, int]) -> _Step:
        """`writers` are those of the batch so far, by block: when all holders of one write, the last need not copy."""
        size = self.block_size
        room = len(sequence.blocks) * size - sequence.length
        copied = False
        if room:
            last = sequence.blocks[-1]
            holders = self.pool.count(last)
            if holders > 1:
                writers[last] = writers.get(last, 0) + 1
                copied = writers[last] < holders
        first = sequence.released
        if self.window is not None:
            first = max(first, (sequence.length - self.window) // size)
        return _Step(sequence, count, max(0, -(-(count - room) // size)), room > 0, copied, first)

    def _freed(self, released: Sequence[int]) -> int:
        """How many blocks are free once these have one holder less for each time they occur."""
        times: dict[int, int] = {}
        for block in released:
            times[block] = times.get(block, 0) + 1
        return sum(self.pool.count(block) == n for block, n in times.items())

    def _release(self, steps: Sequence[_Step], released: Sequence[int]) -> None:
        self.pool.decref(released)
        for sequence, first in ((step.sequence, step.first) for step in steps):
            for i in range(sequence.released, first):
                sequence.blocks[i] = 0
            sequence.released = first

    def _extend(self, step: _Step, own: Iterator[int], more: Iterator[int], slots: list[int]) -> None:
        size, sequence, count = self.block_size, step.sequence, step.tokens
        blocks, begin = sequence.blocks, sequence.length
        if step.copied:
            blocks[-1] = next(own)
        elif step.written:
            self.pool.forget(blocks[-1])  # a sequence that was truncated writes something else there
        blocks.extend(islice(more, step.new))
        sequence.length = end = begin + count
        if count == 1:
            slots.append(blocks[-1] * size + begin % size)
            return
        for i in range(begin // size, len(blocks)):
            base = (blocks[i] - i) * size  # slot of token 0, were it in this block
            slots.extend(range(base + max(begin, i * size), base + min(end, (i + 1) * size)))

    def commit(self, sequences: Sequence[Held], tokens: Sequence[array[int]]) -> None:
        """The next tokens of each sequence that are written, so that its full blocks can be found again."""
        for i, (sequence, more) in enumerate(zip(sequences, tokens, strict=True)):
            waiting = sequence.length - len(sequence.tokens)
            if len(more) > waiting:
                raise InvalidValueError(
                    f"tokens[{i}] has {len(more)} entries: must have at most {waiting}, the ones reserved since"
                )
        if self.reuse:
            for sequence, more in zip(sequences, tokens, strict=True):
                sequence.tokens.extend(more)
                self._hash(sequence)

    def _hash(self, sequence: Held) -> None:
        size, hashes = self.block_size, sequence.hashes
        while len(hashes) * size <= len(sequence.tokens):
            i = len(hashes) - 1
            hashes.append(block_hash(hashes[i], sequence.tokens[i * size : (i + 1) * size]))
            if i >= sequence.released:
                self.pool.register(sequence.blocks[i], hashes[-1])

    def fork(self, sequence: Held) -> int:
        """The id of a sequence that holds the same blocks."""
        self.pool.incref(sequence.held)
        copies = sequence.blocks[:], sequence.length, sequence.tokens[:], sequence.hashes[:]
        return self._enter(*copies, sequence.released)

    def truncate(self, sequence: Held, length: int) -> None:
        """Its first `length` tokens remain."""
        if length > sequence.length:
            raise InvalidValueError(f"length = {length}: must be at most {sequence.length}, that of the sequence")
        if self.window is not None and sequence.released and length:
            gone = sequence.released * self.block_size
            if length - self.window < gone:
                raise InvalidValueError(
                    f"length = {length}: must be 0 or >= {gone + self.window}, as the first {gone} tokens are released"
                )
        keep = -(-length // self.block_size)
        self.pool.decref(sequence.blocks[max(keep, sequence.released) :][::-1])
        del sequence.blocks[keep:]
        del sequence.tokens[length:]
        del sequence.hashes[length // self.block_size + 1 :]
        sequence.length = length
        sequence.released = min(sequence.released, keep)

    def free(self, seq_id: int) -> None:
        (sequence,) = self.take((seq_id,))
        pool = self.host_pool if sequence.on_host else self.pool
        pool.decref(sequence.held[::-1])  # so that the end of a prefix is forgotten before its beginning
        del self.sequences[seq_id]

    def swap(self, seq_ids: Iterable[int], to_host: bool, move: Move) -> int:
        """Move sequences between the pools, all or none, and how many blocks; those that several hold go once."""
        group = self.take(seq_ids)
        _check_once(group)
        for sequence in group:
            if sequence.on_host == to_host:
                raise InvalidValueError(f"sequence {sequence.seq_id} is {'already' if to_host else 'not'} swapped out")
        source, target = (self.pool, self.host_pool) if to_host else (self.host_pool, self.pool)
        moved = dict.fromkeys(block for sequence in group for block in sequence.held)
        if len(moved) > target.num_free:
            place = "host blocks" if to_host else "blocks"
            raise OutOfBlocksError(f"{len(moved)} {place} are needed: must be at most {target.num_free}, the free ones")
        fresh = target.allocate(len(moved))
        _move(target, move, list(moved), fresh, fresh)
        new = dict(zip(moved, fresh, strict=True))
        for sequence in group:
            held = sequence.held
            sequence.blocks[sequence.released :] = array("i", [new[block] for block in held])
            target.incref(sequence.held)
            source.decref(held[::-1])
            sequence.on_host = to_host
        target.decref(fresh)  # the allocation's own
        if not to_host:
            self._find_again(group)
        return len(fresh)

    def _find_again(self, group: Sequence[Held]) -> None:
        for sequence in group:
            for i in range(sequence.released, len(sequence.hashes) - 1):
                self.pool.register(sequence.blocks[i], sequence.hashes[i + 1])


def _check_once(sequences: Sequence[Held]) -> None:
    if len(set(map(id, sequences))) < len(sequences):
        raise InvalidValueError(f"seq_ids = {[s.seq_id for s in sequences]}: must name each sequence once")


def _move(pool: BlockPool, move: Move, begin: list[int], end: list[int], fresh: list[int]) -> None:
    """Move blocks, all at once; if that fails, nobody has the fresh ones."""
    if not begin:
        return
    try:
        move(list(zip(begin, end, strict=True)))
    except BaseException:
        pool.decref(fresh[::-1])
        raise
