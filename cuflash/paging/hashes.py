"""Hashes of full blocks: equal only where every token from the first on, and `extra`, are equal."""

from __future__ import annotations

from array import array
from hashlib import blake2b

_DIGEST = 32  # bytes: nobody finds two prefixes with one hash, not even on purpose


def root_hash(extra: str | bytes | None) -> bytes:
    """What the first block's hash begins with: whatever beside the tokens decides keys and values, an adapter say."""
    kind = b"none" if extra is None else b"text" if isinstance(extra, str) else b"data"
    data = b"" if extra is None else extra.encode() if isinstance(extra, str) else extra
    return blake2b(kind + data, digest_size=_DIGEST).digest()


def block_hash(parent: bytes, tokens: array[int]) -> bytes:
    """H(hash of the block before, or the root; the tokens of this one)."""
    return blake2b(parent + tokens.tobytes(), digest_size=_DIGEST).digest()
