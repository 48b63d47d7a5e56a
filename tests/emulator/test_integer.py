"""Integer instructions against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.programs import evaluate

RNG = np.random.default_rng(1)
EDGES = {4: [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF]}
EDGES[8] = [0, 1, 2, 63, 64, 65, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**32, 2**32 - 1]
EDGES[2] = [0, 1, 2, 15, 16, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]


def operands(width: int, count: int, seed: int) -> list[np.ndarray]:
    """`count` arrays of unsigned words: every pair of edge values, then random ones."""
    rng = np.random.default_rng(seed)
    edges = np.array(EDGES[width], np.uint64)
    grid = np.stack(np.meshgrid(edges, edges, indexing="ij"), -1).reshape(-1, 2)
    words = (
        rng.integers(0, 1 << (8 * width), (400, count), np.uint64, endpoint=False)
        if width < 8
        else rng.integers(0, 2**64 - 1, (400, count), np.uint64)
    )
    shifts = words >> rng.integers(0, 8 * width, words.shape, np.uint64)
    head = np.concatenate([grid, rng.choice(edges, (len(grid), max(0, count - 2)))], 1)[:, :count]
    return list(np.concatenate([head, words, shifts]).astype(f"u{width}").T.copy())


def signed(value: int, width: int) -> int:
    value %= 1 << (8 * width)
    return value - (1 << (8 * width)) if value >> (8 * width - 1) else value


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a if b == 0 else a - quotient(a, b) * b,
}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_two_operands(name: str, kind: str) -> None:
    width = int(kind[1:]) // 8
    a, b = operands(width, 2, 3)
    result = evaluate(f"{name}.{kind} %d, %0, %1;", a, b, out=a.dtype)
    read = (lambda v: signed(int(v), width)) if kind[0] == "s" else int
    expected = [ARITHMETIC[name](read(x), read(y)) % (1 << (8 * width)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(result, np.array(expected, a.dtype))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_high_products(kind: str) -> None:
    width = int(kind[1:]) // 8
    a, b = operands(width, 2, 4)
    read = (lambda v: signed(int(v), width)) if kind[0] == "s" else int
    products = [read(x) * read(y) for x, y in zip(a, b, strict=True)]
    high = np.array([(p >> (8 * width)) % (1 << (8 * width)) for p in products], a.dtype)
    np.testing.assert_array_equal(evaluate(f"mul.hi.{kind} %d, %0, %1;", a, b, out=a.dtype), high)
    np.testing.assert_array_equal(evaluate(f"mad.hi.{kind} %d, %0, %1, 5;", a, b, out=a.dtype), high + a.dtype.type(5))
    if width < 8:
        wide = np.array([p % (1 << (16 * width)) for p in products], f"u{2 * width}")
        np.testing.assert_array_equal(evaluate(f"mul.wide.{kind} %d, %0, %1;", a, b, out=wide.dtype), wide)


def test_multiply_add() -> None:
    a, b, c = operands(4, 3, 5)
    np.testing.assert_array_equal(evaluate("mad.lo.s32 %d, %0, %1, %2;", a, b, c), a * b + c)
    wide = c.astype(np.uint64) << np.uint64(17)
    expected = a.astype(np.int32).astype(np.int64) * b.astype(np.int32) + wide.astype(np.int64)
    np.testing.assert_array_equal(evaluate("mad.wide.s32 %d, %0, %1, %2;", a, b, wide, out="i8"), expected)
    np.testing.assert_array_equal(evaluate("sad.u32 %d, %0, %1, %2;", a, b, c), np.where(a > b, a - b, b - a) + c)
    low = (a & 0xFFFFFF) * (b & 0xFFFFFF).astype(np.uint64)
    np.testing.assert_array_equal(evaluate("mul24.lo.u32 %d, %0, %1;", a, b), low.astype(np.uint32))


def test_saturating_add_and_sub() -> None:
    a, b = operands(4, 2, 6)
    x, y = a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64)
    for name, value in (("add", x + y), ("sub", x - y)):
        expected = np.clip(value, -(2**31), 2**31 - 1).astype(np.int32)
        np.testing.assert_array_equal(evaluate(f"{name}.sat.s32 %d, %0, %1;", a, b, out="i4"), expected)


def test_sign() -> None:
    (a,) = operands(4, 1, 7)
    np.testing.assert_array_equal(evaluate("neg.s32 %d, %0;", a), -a)
    np.testing.assert_array_equal(evaluate("abs.s32 %d, %0;", a, out="i4"), np.abs(a.view(np.int32)))
    np.testing.assert_array_equal(evaluate("not.b32 %d, %0;", a), ~a)
    np.testing.assert_array_equal(evaluate("cnot.b32 %d, %0;", a), (a == 0).astype(np.uint32))


def test_carries_chain() -> None:
    a, b = operands(8, 2, 8)
    setup = ".reg .b32 %al, %ah, %bl, %bh, %l, %h;"
    parts = "mov.b64 {%al, %ah}, %0; mov.b64 {%bl, %bh}, %1;"
    add = evaluate(
        f"{parts} add.cc.u32 %l, %al, %bl; addc.u32 %h, %ah, %bh; mov.b64 %d, {{%l, %h}};", a, b, out="u8", setup=setup
    )
    np.testing.assert_array_equal(add, a + b)
    sub = evaluate(
        f"{parts} sub.cc.u32 %l, %al, %bl; subc.u32 %h, %ah, %bh; mov.b64 %d, {{%l, %h}};", a, b, out="u8", setup=setup
    )
    np.testing.assert_array_equal(sub, a - b)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_logic_and_shifts(width: int) -> None:
    a, b = operands(width, 2, 9)
    bits = 8 * width
    for name, value in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        np.testing.assert_array_equal(evaluate(f"{name}.b{bits} %d, %0, %1;", a, b, out=a.dtype), value)
    count = (b % (2 * bits)).astype(np.uint32)
    left = [int(x) << int(n) & ((1 << bits) - 1) if n < bits else 0 for x, n in zip(a, count, strict=True)]
    right = [int(x) >> int(n) for x, n in zip(a, count, strict=True)]
    arithmetic = [(signed(int(x), width) >> int(n)) % (1 << bits) for x, n in zip(a, count, strict=True)]
    for name, expected in ((f"shl.b{bits}", left), (f"shr.u{bits}", right), (f"shr.s{bits}", arithmetic)):
        np.testing.assert_array_equal(
            evaluate(f"{name} %d, %0, %1;", a, count, out=a.dtype), np.array(expected, a.dtype)
        )
    np.testing.assert_array_equal(evaluate(f"shl.b{bits} %d, %0, 3;", a, out=a.dtype), a << a.dtype.type(3))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode: str) -> None:
    a, b, c = operands(4, 3, 10)
    c = c % 70
    amount = [int(n) & 31 if mode == "wrap" else min(int(n), 32) for n in c]
    both = [(int(y) << 32) | int(x) for x, y in zip(a, b, strict=True)]
    left = np.array([(v << n >> 32) & 0xFFFFFFFF for v, n in zip(both, amount, strict=True)], np.uint32)
    right = np.array([v >> n & 0xFFFFFFFF for v, n in zip(both, amount, strict=True)], np.uint32)
    np.testing.assert_array_equal(evaluate(f"shf.l.{mode}.b32 %d, %0, %1, %2;", a, b, c), left)
    np.testing.assert_array_equal(evaluate(f"shf.r.{mode}.b32 %d, %0, %1, %2;", a, b, c), right)


def test_lop3_for_every_table() -> None:
    a, b, c = (np.array([x], np.uint32) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for table in range(256):
        expected = np.uint32(0)
        for k in range(8):
            if table >> k & 1:
                expected |= (a[0] if k & 4 else ~a[0]) & (b[0] if k & 2 else ~b[0]) & (c[0] if k & 1 else ~c[0])
        if table in (0, 0xFF, 0x96, 0xE8, 0xCA) or table % 11 == 0:
            assert evaluate(f"lop3.b32 %d, %0, %1, %2, {table};", a, b, c)[0] == expected, table


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    width = int(kind[1:]) // 8
    bits = 8 * width
    a, b = operands(width, 2, 11)
    rng = np.random.default_rng(12)
    start, length = (rng.integers(0, bits + 8, len(a)).astype(np.uint32) for _ in range(2))
    extracted, inserted = [], []
    for x, y, p, n in zip(a.tolist(), b.tolist(), start.tolist(), length.tolist(), strict=True):
        top = min(p + n, bits) - 1  # PTX ISA, bfe: the sign is the bit at min(pos + len - 1, msb)
        sign = 0 if kind[0] == "u" or n == 0 else x >> min(p + n - 1, bits - 1) & 1
        value = sum((x >> (p + k) & 1 if k < n and p + k < bits else sign) << k for k in range(bits))
        extracted.append(value)
        mask = sum(1 << k for k in range(bits) if p <= k < p + n)
        inserted.append(y & ~mask | (x << p) & mask)
        assert top < bits
    np.testing.assert_array_equal(
        evaluate(f"bfe.{kind} %d, %0, %1, %2;", a, start, length, out=a.dtype), np.array(extracted, a.dtype)
    )
    expected = np.array(inserted, a.dtype)
    np.testing.assert_array_equal(
        evaluate(f"bfi.b{bits} %d, %0, %1, %2, %3;", a, b, start, length, out=a.dtype), expected
    )


@pytest.mark.parametrize("width", [4, 8])
def test_bit_counts(width: int) -> None:
    (a,) = operands(width, 1, 13)
    bits, values = 8 * width, [int(x) for x in a]
    assert evaluate(f"popc.b{bits} %d, %0;", a).tolist() == [bin(v).count("1") for v in values]
    assert evaluate(f"clz.b{bits} %d, %0;", a).tolist() == [bits - v.bit_length() for v in values]
    assert evaluate(f"brev.b{bits} %d, %0;", a, out=a.dtype).tolist() == [int(f"{v:0{bits}b}"[::-1], 2) for v in values]
    assert evaluate(f"bfind.u{bits} %d, %0;", a).tolist() == [(v.bit_length() - 1) % 2**32 for v in values]
    magnitude = [v if v >> (bits - 1) == 0 else ~v % (1 << bits) for v in values]
    assert evaluate(f"bfind.s{bits} %d, %0;", a).tolist() == [(v.bit_length() - 1) % 2**32 for v in magnitude]
    shift = [(bits - v.bit_length()) if v else 2**32 - 1 for v in values]
    assert evaluate(f"bfind.shiftamt.u{bits} %d, %0;", a).tolist() == shift


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_prmt(mode: str) -> None:
    a, b, c = operands(4, 3, 14)
    expected = []
    for x, y, s in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        data = (y << 32 | x).to_bytes(8, "little")
        n = s & 3
        picks = {
            "": [s >> 4 * k & 15 for k in range(4)],
            ".f4e": [n + k for k in range(4)],
            ".b4e": [(n - k) % 8 for k in range(4)],
            ".rc8": [n] * 4,
            ".ecl": [max(k, n) for k in range(4)],
            ".ecr": [min(k, n) for k in range(4)],
            ".rc16": [0, 1, 0, 1] if n % 2 == 0 else [2, 3, 2, 3],
        }[mode]
        chosen = [(0xFF if data[p & 7] & 0x80 else 0) if p & 8 else data[p & 7] for p in picks]
        expected.append(int.from_bytes(bytes(chosen), "little"))
    assert evaluate(f"prmt.b32{mode} %d, %0, %1, %2;", a, b, c).tolist() == expected


INTEGER_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64", "u16", "s16"])
def test_comparisons(kind: str) -> None:
    width = int(kind[1:]) // 8
    a, b = operands(width, 2, 15)
    x, y = (v.view(f"i{width}") if kind[0] == "s" else v for v in (a, b))
    for name, sign in INTEGER_COMPARISONS.items():
        expected = eval(f"x {sign} y", {"x": x, "y": y})
        np.testing.assert_array_equal(evaluate(f"setp.{name}.{kind} %d, %0, %1;", a, b, out=bool), expected)
        if width == 4:
            np.testing.assert_array_equal(
                evaluate(f"set.{name}.u32.{kind} %d, %0, %1;", a, b), expected * np.uint32(0xFFFFFFFF)
            )
            np.testing.assert_array_equal(evaluate(f"set.{name}.f32.{kind} %d, %0, %1;", a, b, out="f4"), expected)
    if kind[0] == "u":
        for name, sign in {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}.items():
            expected = eval(f"a {sign} b", {"a": a, "b": b})
            np.testing.assert_array_equal(evaluate(f"setp.{name}.{kind} %d, %0, %1;", a, b, out=bool), expected)


def test_predicates_combine() -> None:
    a, b = operands(4, 2, 16)
    p = np.arange(len(a)) % 3 == 0
    for join, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        less = a < b
        np.testing.assert_array_equal(
            evaluate(f"setp.lt.{join}.u32 %d, %0, %1, %2;", a, b, p, out=bool), combine(less, p)
        )
        np.testing.assert_array_equal(
            evaluate(f"setp.lt.{join}.u32 %d, %0, %1, !%2;", a, b, p, out=bool), combine(less, ~p)
        )
        both = evaluate(
            f"setp.lt.{join}.u32 %d|%q, %0, %1, %2; mov.pred %d, %q;", a, b, p, out=bool, setup=".reg .pred %q;"
        )
        np.testing.assert_array_equal(both, combine(~less, p))
        np.testing.assert_array_equal(evaluate(f"{join}.pred %d, %0, %1;", p, a < b, out=bool), combine(p, less))
    np.testing.assert_array_equal(evaluate("not.pred %d, %0;", p, out=bool), ~p)


def test_selection_and_guards() -> None:
    a, b = operands(4, 2, 17)
    p = np.arange(len(a)) % 3 == 0
    np.testing.assert_array_equal(evaluate("selp.b32 %d, %0, %1, %2;", a, b, p), np.where(p, a, b))
    np.testing.assert_array_equal(evaluate("slct.u32.s32 %d, %0, %1, %1;", a, b), np.where(b.view(np.int32) >= 0, a, b))
    np.testing.assert_array_equal(evaluate("mov.u32 %d, %0; @%2 mov.u32 %d, %1;", a, b, p), np.where(p, b, a))
    np.testing.assert_array_equal(evaluate("mov.u32 %d, %0; @!%2 add.u32 %d, %d, %1;", a, b, p), np.where(p, a, a + b))


def test_moves_pack_and_unpack() -> None:
    (a,) = operands(8, 1, 18)
    setup = ".reg .b32 %l, %h; .reg .b16 %w<4>;"
    swapped = (a >> np.uint64(32)) | (a << np.uint64(32))
    np.testing.assert_array_equal(
        evaluate("mov.b64 {%l, %h}, %0; mov.b64 %d, {%h, %l};", a, out="u8", setup=setup), swapped
    )
    text = "mov.b64 {%w0, %w1, %w2, %w3}, %0; mov.b64 %d, {%w3, %w2, %w1, %w0};"
    reverse = a.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0]
    np.testing.assert_array_equal(evaluate(text, a, out="u8", setup=setup), reverse)
    low = a.astype(np.uint32)
    np.testing.assert_array_equal(evaluate("mov.b32 {_, %w1}, %0; cvt.u32.u16 %d, %w1;", low, setup=setup), low >> 16)


def test_bmsk() -> None:
    start, length = np.meshgrid(np.arange(0, 40, 3, dtype=np.uint32), np.arange(0, 40, 3, dtype=np.uint32))
    start, length = start.ravel(), length.ravel()
    pairs = list(zip(start.tolist(), length.tolist(), strict=True))
    clamped = [sum(1 << k for k in range(32) if p <= k < p + n) for p, n in pairs]
    assert evaluate("bmsk.clamp.b32 %d, %0, %1;", start, length).tolist() == clamped
    wrapped = [sum(1 << k for k in range(32) if p % 32 <= k < p % 32 + n % 32) for p, n in pairs]
    assert evaluate("bmsk.wrap.b32 %d, %0, %1;", start, length).tolist() == wrapped
