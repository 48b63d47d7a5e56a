"""Writes docs/accuracy.md: errors of out, lse and the gradients by precision, inputs and algorithm.

    python docs/make_accuracy.py [--device=cuda] [--output=FILE]

The kernels run on the emulated device, which takes some minutes, or with --device=cuda on a GPU, at a larger
size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from rich.progress import Progress

import cuflash
from cuflash import Options
from cuflash.reference import chunked_attention

TARGET = Path(__file__).with_name("accuracy.md")
PRECISIONS = ("float16", "bfloat16", "float32", "tf32", "float64")
ALGORITHMS = ("standard", "chunked", "flash, CPU", "flash, kernels")
RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias")
ARCH = "sm_90"  # emulated
EXACT_SEQLEN = 2048  # at most, of what is compared with sums in np.longdouble, which no library multiplies fast
EXACT_BITS = 63  # of np.longdouble's mantissa: what float64 is held against needs some more than its 52

Array = Any  # of NumPy or CuPy
Arrays = dict[str, np.ndarray]  # by the names of RESULTS


class Size(NamedTuple):
    """Of a batch of one."""

    seqlen: int
    heads: int
    head_dim: int


SIZES = {"emulated": Size(256, 2, 64), "cuda": Size(16384, 4, 64)}


class Case(NamedTuple):
    """Which inputs, and what is asked of them."""

    name: str
    outliers: bool = False
    causal: bool = False
    bias: bool = False


CASES = (
    Case("normal"),
    Case("normal, causal", causal=True),
    Case("normal, bias", bias=True),
    Case("outliers", outliers=True),
    Case("outliers, causal", outliers=True, causal=True),
    Case("outliers, bias", outliers=True, bias=True),
)


class Inputs(NamedTuple):
    """Host arrays of one dtype: q, k, v, dout (1, seqlen, heads, head_dim), bias (seqlen, seqlen) or None."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    bias: np.ndarray | None
    causal: bool

    def convert(self, function: Callable[[np.ndarray], Array]) -> Inputs:
        q, k, v, dout = (function(x) for x in self[:4])
        return Inputs(q, k, v, dout, None if self.bias is None else function(self.bias), self.causal)


class Arithmetic(NamedTuple):
    """Operations run in `compute`; the factors of matrix products are rounded, and so is what goes to memory."""

    compute: Any
    factor: Callable[[Array], Array]
    stored: Callable[[Array], Array]


class Error(NamedTuple):
    """To the digits that are printed."""

    rmse: float
    largest: float


Table = dict[tuple[str, str], dict[str, Error]]  # by case and algorithm, then by result

TEXT = """\
# Accuracy

Written by `{command}`. Batch 1, {heads} heads of {head_dim}, {seqlen} tokens{shortened}. {device}
Every figure is an error against exact attention of the same inputs: root of the mean square, in brackets the largest.

## What is compared

- **Inputs.** q, k, v and the cotangent of out are N(0, 1), rounded to the dtype. With outliers q, k and v are
  N(0, 1) + N(0, 100) · Bernoulli(0.001), 100 the variance, as in the FlashAttention-3 paper. A bias is N(0, 1) for
  every query and key, the same for all heads and of the inputs' dtype; dbias is summed over the heads. The cotangent of
  lse is 0.
- **Exact** is standard attention in float64. float64 itself is compared with standard attention in `np.longdouble`,
  whose mantissa has 64 bits on x86: the errors of its own sums are some 2⁻¹¹ of those measured.
- **standard** is attention as a framework without a fused kernel computes it: every matrix is stored in the dtype. In
  16 bits S = QKᵀ, S + bias, P = softmax(S), O = PV, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(P ∘ dP)), dQ, dK and dV are each
  rounded to the dtype; products are summed in float32, and a softmax is float32 within. float32 and float64 are
  NumPy's operations, their products those of its BLAS. tf32 is float32 but that both factors of every product are
  rounded to 11 significant bits, to nearest.
- **chunked** is `cuflash.reference.chunked_attention` (Rabe & Staats), all of it in float32, in float64 for float64;
  results are rounded to the dtype.
- **flash, CPU** is `cuflash.attention` on NumPy arrays: sums and P in float32, in float64 for float64.
- **flash, kernels** is `cuflash.attention` on the device, with `Options(num_splits=1)`, as the plan chooses for
  problems that fill a GPU. In 16 bits P and dS are rounded to the dtype as factors of products. tf32 is
  `Options(precision="tf32")`.

## Flash against standard attention

Root of the mean square error, as a fraction of standard attention's, from the best case to the worst:

{ratios}

- **16 bits.** Standard attention rounds S, P, dP and dS when it stores them. Flash stores none of them: what is left is
  the rounding of the results, and of P and dS as factors. dq and dk with outliers have one thing more: their Δ
  = rowsum(dO ∘ O) is made of the rounded out. `chunked` keeps out in float32; the difference is what that would gain.
- **tf32.** Both round the same factors of the same products, and that is nearly all of the error.
- **float32 and float64.** Here standard attention rounds nothing that flash does not; the two differ in the order of
  sums and in where P comes from. Flash has the smaller error in all but these:
    - **dbias.** Gradients make P again, as exp(S - lse). lse is rounded, which standard attention's row sum is not, and
      so is S - lse, which is larger than S less the row's largest score. That is an error of each P alone: long sums do
      not show it, dbias does. The kernels' dbias errs 8 to 13 % more than standard attention's. On the CPU S - c, with
      c below lse, is rounded more finely, and dbias is divided by the sums of the rows of P: 0 to 1 % in float32, 6 to
      10 % in float64.
    - **dq on the CPU.** Δ does not contain the roundings of dP, as standard attention's rowsum(P ∘ dP) does: where one
      key has nearly all the weight, dP - Δ cancels, and they are left. That is so in the first rows of a causal mask,
      which see few keys: 3 to 6 % more. To correct it the products of S and dP would have to run twice.
    - **lse on the CPU**, half a percent more with outliers and a bias in float32, 3 % with a bias in float64: there the
      maximum of a row is a running one, by which sums are scaled anew.
  Without what the CPU's gradients do about it (P made of the forward's own scores and exponentials, to the bit; Δ in
  float64; sums of dk and dv over 64 queries at a time) dq erred up to 1.54 times as much as standard attention's, dk
  1.21, dv 1.14 and dbias 1.30 times.
- **More tokens.** Of 1024 with outliers, 12 heads, float32, on the CPU, dq errs up to 1.05 times as much as standard
  attention's, dk 1.11, dv 1.06 and dbias 1.12 times. A few rows, in which one key has most of the weight, make most of
  that: it is Δ again, and lse.

{sections}
"""
COMMANDS = {"emulated": "python docs/make_accuracy.py", "cuda": "python docs/make_accuracy.py --device=cuda"}
EMULATED = f"""The kernels ran on the
emulated device (`{ARCH}`), whose tensor cores round as those of an H200 were recorded to
([float32-on-tensor-cores.md](float32-on-tensor-cores.md)). Another BLAS gives other last digits."""


def make_inputs(case: Case, precision: str, size: Size) -> Inputs:
    """The same numbers for every precision, rounded to its dtype."""
    rng = np.random.default_rng(0)
    dtype = array_dtype(precision)
    shape = 1, *size
    q, k, v, dout = rng.standard_normal((4, *shape))
    if case.outliers:
        for x in (q, k, v):  # N(0, 1) + N(0, 100) Bernoulli(0.001), 100 the variance
            x += 10 * rng.standard_normal(shape) * (rng.random(shape) < 0.001)
    bias = rng.standard_normal((size.seqlen, size.seqlen)) if case.bias else None
    return Inputs(q, k, v, dout, bias, case.causal).convert(lambda x: x.astype(dtype))


def array_dtype(precision: str) -> np.dtype:
    """Of the arrays; TF32 is a way to multiply float32."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "tf32": np.float32}.get(precision, precision))


def arithmetic(precision: str, xp: ModuleType) -> Arithmetic:
    """How a framework computes in `precision`: 16-bit numbers in float32, and every result rounded to 16 bits."""

    def same(x: Array) -> Array:
        return x

    def to_float16(x: Array) -> Array:
        return x.astype(xp.float16).astype(xp.float32)

    def to_bfloat16(x: Array) -> Array:  # to nearest, ties to even
        bits = x.view(xp.uint32)
        return (bits + (bits >> 16 & 1) + 0x7FFF & 0xFFFF0000).view(xp.float32)

    def to_tf32(x: Array) -> Array:  # to nearest, ties away from zero, as cvt.rna does
        return (x.view(xp.uint32) + 0x1000 & 0xFFFFE000).view(xp.float32)

    return {
        "float16": Arithmetic(xp.float32, same, to_float16),
        "bfloat16": Arithmetic(xp.float32, same, to_bfloat16),
        "float32": Arithmetic(xp.float32, same, same),
        "tf32": Arithmetic(xp.float32, to_tf32, same),
        "float64": Arithmetic(xp.float64, same, same),
        "longdouble": Arithmetic(np.longdouble, same, same),
    }[precision]


def standard(inputs: Inputs, precision: str, xp: ModuleType) -> Arrays:
    """Standard attention and its gradients, head by head; `xp` computes, results are on the host."""
    how = arithmetic(precision, xp)
    shape = inputs.q.shape
    _, seqlen, heads, _ = shape
    results: Arrays = {name: np.empty(shape, how.compute) for name in ("out", "dq", "dk", "dv")}
    results["lse"] = np.empty((1, heads, seqlen), how.compute)
    wide = inputs.convert(lambda x: xp.asarray(x.astype(how.compute)))

    def run(head: int) -> Array:
        q, k, v, dout = (x[0, :, head] for x in wide[:4])
        *of_tokens, lse, ds = standard_head(q, k, v, dout, wide.bias, inputs.causal, how, xp)
        for name, x in zip(("out", "dq", "dk", "dv"), of_tokens, strict=True):
            results[name][0, :, head] = to_host(x)
        results["lse"][0, head] = to_host(lse)
        return ds

    dbias: Array = 0
    with ThreadPoolExecutor(heads if xp is np else 1) as pool:
        for ds in pool.map(run, range(heads)):
            if inputs.bias is not None:
                dbias = dbias + ds
    return results if inputs.bias is None else results | {"dbias": to_host(how.stored(dbias))}


def standard_head(
    q: Array, k: Array, v: Array, dout: Array, bias: Array | None, causal: bool, how: Arithmetic, xp: ModuleType
) -> tuple[Array, ...]:
    """out, dq, dk, dv (seqlen, head_dim), lse (seqlen,) and dS (seqlen, seqlen) of one head."""

    def product(a: Array, b: Array) -> Array:
        return how.stored(how.factor(a) @ how.factor(b))

    scale = q.shape[1] ** -0.5
    s = how.stored(product(q, k.T) * scale)
    if bias is not None:
        s = how.stored(s + bias)
    if causal:
        s = xp.where(xp.tri(len(s), dtype=bool), s, how.compute(-np.inf))
    m = s.max(1)[:, None]
    p = xp.exp(s - m)
    total = p.sum(1)[:, None]
    p = how.stored(p / total)
    dp = product(dout, v.T)
    ds = how.stored(p * (dp - (p * dp).sum(1)[:, None]))
    dq, dk = (how.stored(product(x, y) * scale) for x, y in ((ds, k), (ds.T, q)))
    return product(p, v), dq, dk, product(p.T, dout), (m + xp.log(total))[:, 0], ds


def differentiated(function: Callable[..., Any], inputs: Inputs, **keywords: Any) -> Arrays:
    """Results and gradients of a function of cuflash, on the host."""
    q, k, v, dout, bias, causal = inputs
    (out, lse), pullback = cuflash.vjp(function, q, k, v, bias=bias, causal=causal, return_lse=True, **keywords)
    arrays = out, lse, *pullback((dout, 0 * lse))
    return {name: to_host(x) for name, x in zip(RESULTS, arrays, strict=False)}  # dbias where there is a bias


def on_kernels(inputs: Inputs, precision: str, device: str) -> Arrays:
    options = Options(num_splits=1, precision="tf32" if precision == "tf32" else None)
    if device == "emulated":
        with cuflash.emulate(ARCH, check_races=False):
            return differentiated(cuflash.attention, inputs, options=options)
    return differentiated(cuflash.attention, inputs.convert(module(device).asarray), options=options)


def module(device: str) -> ModuleType:
    """What computes standard attention."""
    if device == "emulated":
        return np
    import cupy

    return cupy


def to_host(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def algorithms_of(precision: str) -> tuple[str, ...]:
    """The CPU multiplies float32 as it is."""
    return ("standard", "flash, kernels") if precision == "tf32" else ALGORITHMS


def measure(inputs: Inputs, precision: str, device: str) -> Iterator[tuple[str, dict[str, Error]]]:
    """Each algorithm that has the precision, with the errors of its results."""
    xp = module(device)
    exact = standard(inputs, "longdouble", np) if precision == "float64" else standard(inputs, "float64", xp)
    algorithms: dict[str, Callable[[], Arrays]] = {
        "standard": lambda: standard(inputs, precision, xp),
        "chunked": lambda: differentiated(chunked_attention, inputs),
        "flash, CPU": lambda: differentiated(cuflash.attention, inputs),
        "flash, kernels": lambda: on_kernels(inputs, precision, device),
    }
    for name in algorithms_of(precision):
        results = algorithms[name]()
        yield name, {result: error(results[result], exact[result]) for result in exact}


def error(got: np.ndarray, want: np.ndarray) -> Error:
    difference = np.abs(got.astype(want.dtype) - want)
    return Error(float(f"{np.sqrt(np.mean(difference**2)):.2e}"), float(f"{difference.max():.1e}"))


def document(tables: dict[str, Table], device: str) -> str:
    """The text of accuracy.md."""
    size = SIZES[device]
    ratios = [
        (f"{precision}, {name.removeprefix('flash, ')}", *(ratio_cell(tables[precision], name, r) for r in RESULTS))
        for name in ("flash, kernels", "flash, CPU")
        for precision in tables
        if name in algorithms_of(precision)
    ]
    sections = [
        f"## {precision}\n\n"
        + markdown(
            ("inputs", "algorithm", *RESULTS),
            [(*key, *(cell(errors.get(result)) for result in RESULTS)) for key, errors in table.items()],
        )
        for precision, table in tables.items()
    ]
    return TEXT.format(
        command=COMMANDS[device],
        device=description(device),
        shortened=f", {EXACT_SEQLEN} in float64" if size.seqlen > EXACT_SEQLEN else "",
        **size._asdict(),
        ratios=markdown(("", *RESULTS), ratios),
        sections="\n\n".join(sections),
    )


def description(device: str) -> str:
    if device == "emulated":
        return EMULATED
    name = module(device).cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"The kernels ran on a GPU, {name}."


def ratios_to_standard(table: Table, name: str, result: str) -> list[float]:
    """RMSE of one algorithm over that of standard attention, case by case."""
    return [
        errors[result].rmse / table[case, "standard"][result].rmse
        for (case, algorithm), errors in table.items()
        if algorithm == name and result in errors
    ]


def ratio_cell(table: Table, name: str, result: str) -> str:
    ratios = ratios_to_standard(table, name, result)
    return f"{min(ratios):.2g} to {max(ratios):.2f}"


def cell(value: Error | None) -> str:
    return "–" if value is None else f"{value.rmse:.2e} ({value.largest:.1e})"


def read_cell(text: str) -> Error | None:
    return None if text == "–" else Error(*map(float, text.rstrip(")").split(" (")))


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, tuple("---" for _ in head), *rows))


def tables_in(text: str) -> dict[str, Table]:
    """What `document` made a text of."""
    tables: dict[str, Table] = {}
    for section in text.split("\n## ")[1:]:
        precision, *lines = section.splitlines()
        if precision in PRECISIONS:
            table = tables[precision] = {}
            for line in lines[3:]:
                case, algorithm, *cells = line.strip("| ").split(" | ")
                errors = zip(RESULTS, map(read_cell, cells), strict=True)
                table[case, algorithm] = {name: value for name, value in errors if value is not None}
    return tables


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--device", choices=tuple(SIZES), default="emulated")
    parse.add_argument("--output", type=Path, default=TARGET)
    parse.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    args = parse.parse_args()
    bits = np.finfo(np.longdouble).nmant
    if bits < EXACT_BITS:
        print(f"np.longdouble has {bits} bits of mantissa: must have {EXACT_BITS}, as under Linux on x86")
        return 1
    tables: dict[str, Table] = {precision: {} for precision in args.precision}
    with Progress() as progress:
        task = progress.add_task("", total=sum(len(CASES) * len(algorithms_of(precision)) for precision in tables))
        for precision, table in tables.items():
            size = SIZES[args.device]
            if precision == "float64":
                size = size._replace(seqlen=min(size.seqlen, EXACT_SEQLEN))
            for case in CASES:
                progress.update(task, description=f"{precision}, {case.name}")
                for name, errors in measure(make_inputs(case, precision, size), precision, args.device):
                    table[case.name, name] = errors
                    progress.advance(task)
    args.output.write_text(document(tables, args.device), encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
