"""Calls on streams: on CuPy's current one, after the work that is on it, without waiting; on the arrays' GPU."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

from tests.cuda.calls import CALLS, LONG, SHAPE, SHORT, assert_same, expected, inputs, keep_busy


@pytest.mark.parametrize("name", CALLS)
def test_a_call_stays_on_the_current_stream_and_waits_for_nothing(name: str) -> None:
    """The inputs get their values on the stream, behind a kernel that takes its time; so does the default stream.

    A launch on another stream would see the inputs of before; one that synchronises would come back late.
    """
    fresh = inputs(1)
    want = expected(name, fresh)
    arrays = [cupy.zeros(SHAPE, np.float16) for _ in range(4)]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def run() -> list[cupy.ndarray]:
        for array, value in zip(arrays, fresh, strict=True):
            cupy.copyto(array, value)
        return list(CALLS[name](*arrays))

    with stream:  # compiles, loads, and gives the stream's memory pool what the call takes: allocations synchronise
        keep_busy(1)
        first = run()
        for array in (*arrays, *first):
            array.fill(0)
    del first, array
    cupy.cuda.Device().synchronize()

    keep_busy(LONG)
    default = cupy.cuda.Stream.null.record()
    with stream:
        keep_busy(SHORT)
        results = run()
        done = stream.record()
    assert not done.done, "the call waited for its stream"
    stream.synchronize()
    assert not default.done, "the call waited for the default stream"
    with stream:
        got = [cupy.asnumpy(result) for result in results]
    cupy.cuda.Device().synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("number", range(cupy.cuda.runtime.getDeviceCount()))
def test_the_gpu_of_the_arrays_is_used_whichever_is_current(number: int) -> None:
    want = expected("attention", inputs(2))
    with cupy.cuda.Device(number):
        arrays = inputs(2)
    results = CALLS["attention"](*arrays)
    assert {result.device.id for result in results} == {number}
    assert cupy.cuda.Device().id == 0
    with cupy.cuda.Device(number):
        assert_same([cupy.asnumpy(result) for result in results], want)
