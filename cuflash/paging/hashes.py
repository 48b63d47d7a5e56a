"""Hashes of full blocks: equal only where every token from the first on, and `extra`, are equal.

Nobody finds two prefixes with one SHA-256, not even on purpose.
"""

from __future__ import annotations

from array import array
from hashlib import sha256

_PLAIN = sha256(b"plain").digest()


def root_hash(extra: str | bytes | None) -> bytes:
    """What the first block's hash begins with: whatever beside the tokens decides keys and values."""
    if extra is None:
        return _PLAIN
    return sha256(b"text" + extra.encode() if isinstance(extra, str) else b"data" + extra).digest()


def block_hash(parent: bytes, tokens: array[int]) -> bytes:
    """H(hash of the block before, or the root; the tokens of this one)."""
    return sha256(parent + tokens.tobytes()).digest()
