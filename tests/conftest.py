"""Options and fixtures of all tests. A test that takes `device` runs once on every device asked for by --device."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its BLAS: pytest's workers share the cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest

from tests.devices import ALL_DTYPES, DEVICES

hypothesis.settings.register_profile("cuflash", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("cuflash")

DEFAULT_DEVICES = ("cpu", "emulated")

# Translated kernels are many objects that stay: to look through them again and again took a tenth of the time. Now and
# then it must be, for what tests leave in cycles; and what glibc keeps of freed memory, gigabytes, goes back.
gc.set_threshold(100_000)
TESTS_PER_COLLECTION = 50
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
tests_done = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        action="append",
        choices=tuple(DEVICES),
        help=f"device to test, may be repeated; by default {' and '.join(DEFAULT_DEVICES)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "cache"):  # one kernel cache for all tests and workers, kept between runs, apart from the user's
        os.environ.setdefault("CUFLASH_CACHE_DIR", str(config.cache.mkdir("cuflash")))
    if "cuda" in chosen_devices(config):
        import cupy

        if not cupy.cuda.is_available():
            raise pytest.UsageError("--device=cuda: CuPy finds no GPU on this machine")


def pytest_runtest_teardown() -> None:
    if next(tests_done) % TESTS_PER_COLLECTION == 0:
        gc.collect()
        trim(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `device`, and `dtype` with it where a test takes both and names no dtypes: the pairs that exist."""
    if "device" not in metafunc.fixturenames:
        return
    names = chosen_devices(metafunc.config)
    named = {argument for mark in metafunc.definition.iter_markers("parametrize") for argument in _arguments(mark)}
    if "dtype" in metafunc.fixturenames and "dtype" not in named:
        pairs = [(name, dtype) for name in names for dtype in ALL_DTYPES]
        metafunc.parametrize(("device", "dtype"), pairs, indirect=["device"])
    else:
        metafunc.parametrize("device", names, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest):
    """One of tests/devices.py: `.name`, `.run(function, *arrays, **keywords)`."""
    return DEVICES[request.param]()


def chosen_devices(config: pytest.Config) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.getoption("--device") or DEFAULT_DEVICES))


def _arguments(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
