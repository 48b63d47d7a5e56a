"""docs/accuracy.md is what its generator makes, its figures are what is measured, and flash keeps its bars there."""

from __future__ import annotations

from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import Options
from docs import make_accuracy
from docs.make_accuracy import ALGORITHMS, CASES, PRECISIONS, RESULTS, SIZES, Case, Inputs, Size
from tests import oracle

TEXT = make_accuracy.TARGET.read_text(encoding="utf-8")
TABLES = make_accuracy.tables_in(TEXT)

# Root mean square error, as a fraction of standard attention's, at most: less than 1 but for what the page explains,
# with a few hundredths for the last digits of another BLAS.
BARS = {
    ("flash, kernels", "float32", "dq"): 1.01,
    ("flash, kernels", "float32", "dbias"): 1.15,
    ("flash, kernels", "float64", "dbias"): 1.13,
    ("flash, CPU", "float32", "out"): 1.01,
    ("flash, CPU", "float32", "lse"): 1.03,
    ("flash, CPU", "float32", "dq"): 1.06,
    ("flash, CPU", "float32", "dbias"): 1.06,
    ("flash, CPU", "float64", "lse"): 1.04,
    ("flash, CPU", "float64", "dq"): 1.07,
    ("flash, CPU", "float64", "dbias"): 1.12,
    # Both round the same factors of the same products.
    ("flash, kernels", "tf32", "lse"): 1.001,
    ("flash, kernels", "tf32", "dq"): 1.03,
    ("flash, kernels", "tf32", "dk"): 1.03,
    ("flash, kernels", "tf32", "dv"): 1.01,
    ("flash, kernels", "tf32", "dbias"): 1.01,
}


def inputs_of(precision: str, case: Case, size: Size, heads: int) -> Inputs:
    """The first heads of a case."""
    inputs = make_accuracy.make_inputs(case, precision, size)
    return inputs.convert(lambda x: x[:, :, :heads] if x.ndim == 4 else x)


def test_page_is_what_its_generator_makes_of_the_figures() -> None:
    assert make_accuracy.document(TABLES, "emulated") == TEXT, "run: python docs/make_accuracy.py"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_page_has_every_case_algorithm_and_result(precision: str) -> None:
    table = TABLES[precision]
    algorithms = ALGORITHMS if precision != "tf32" else ("standard", "flash, kernels")
    assert list(table) == [(case.name, algorithm) for case in CASES for algorithm in algorithms]
    for case in CASES:
        for algorithm in algorithms:
            assert tuple(table[case.name, algorithm]) == (RESULTS if case.bias else RESULTS[:-1])


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_flash_keeps_its_bars(precision: str, result: str) -> None:
    for name in make_accuracy.algorithms_of(precision):
        if name.startswith("flash"):
            bar = BARS.get((name, precision, result), 0.999)
            assert max(make_accuracy.ratios_to_standard(TABLES[precision], name, result)) <= bar


@pytest.mark.parametrize("precision", PRECISIONS)
def test_figures_are_what_is_measured(precision: str) -> None:
    """One head of a case of normal inputs; the page's eight vary by a few percent around their mean square."""
    case = CASES[1]
    inputs = inputs_of(precision, case, SIZES["emulated"], 1)
    for algorithm, errors in make_accuracy.measure(inputs, precision, "emulated"):
        for result, (rmse, _) in errors.items():
            assert rmse == pytest.approx(TABLES[precision][case.name, algorithm][result].rmse, rel=0.2), (
                algorithm,
                result,
            )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float64"])
def test_standard_is_the_oracle_s(precision: str, case: Case) -> None:
    """Where the scale is a power of two it does not matter when it is rounded."""
    inputs = make_accuracy.make_inputs(case, precision, Size(40, 2, 16))
    got = make_accuracy.standard(inputs, precision, np)
    q, k, v, dout, bias, causal = inputs
    want = oracle.standard(q, k, v, bias=bias, causal=causal)
    gradients = oracle.standard_gradients(q, k, v, dout, bias=bias, causal=causal)
    eps = float(ml_dtypes.finfo(q.dtype).eps)
    for name, x in zip(RESULTS, (*want, *gradients), strict=True):
        if x is not None:
            np.testing.assert_allclose(got[name], x, rtol=4 * eps, atol=4 * eps, err_msg=name)


def test_longdouble_is_more_exact_than_float64() -> None:
    """out of one query by decimal arithmetic."""
    inputs = make_accuracy.make_inputs(CASES[3], "float64", Size(20, 1, 16))
    q, k, v = (x[0, :, 0] for x in inputs[:3])
    with localcontext() as context:
        context.prec = 40

        def dot(x: np.ndarray, y: np.ndarray) -> Decimal:
            return sum(Decimal(float(a)) * Decimal(float(b)) for a, b in zip(x, y, strict=True))

        weights = [(dot(q[7], key) / 4).exp() for key in k]
        want = [
            sum(w * Decimal(float(x)) for w, x in zip(weights, column, strict=True)) / sum(weights) for column in v.T
        ]
        exact = make_accuracy.standard(inputs, "longdouble", np)["out"][0, 7, 0]
        got = [Decimal(int(np.ldexp(x, 80))) / 2**80 for x in exact]
    errors = [abs(float(a - b)) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 2.0**-58
    assert exact.dtype == np.longdouble


def test_roundings() -> None:
    ulp, one = 2.0**-10, np.float32(1)  # of TF32 at 1
    x = np.array([one + ulp / 2, one + ulp / 2 - 2.0**-23, -one - ulp / 2, one + ulp, 3e38], np.float32)
    np.testing.assert_array_equal(
        make_accuracy.arithmetic("tf32", np).factor(x)[:4], np.array([1 + ulp, 1, -1 - ulp, 1 + ulp], np.float32)
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    x = np.append(bits, bits & 0xFFFF8000).view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(make_accuracy.arithmetic("bfloat16", np).stored(x), want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_weights_beside_a_large_one_count(dtype: str) -> None:
    """One key weighs 1, the other 2047 so little that one of them added to it would not be seen, but all are."""
    gap = {"float32": 17.0, "float64": 37.0}[dtype]
    k = np.zeros((2048, 16), dtype)
    k[3, 0] = 1
    q = np.zeros((1, 16), dtype)
    q[0, 0] = gap
    with cuflash.emulate("sm_90"):
        _, lse = cuflash.attention(q, k, k, scale=1.0, return_lse=True, options=Options(num_splits=1))
    want = gap + np.log1p(2047 * np.exp(-np.longdouble(gap)))
    assert abs(lse[0] - want) <= 1.5 * np.spacing(np.array(gap, dtype))
    assert want - gap > 4 * np.spacing(np.array(gap, dtype))
