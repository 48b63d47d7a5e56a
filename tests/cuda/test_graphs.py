"""A call captured in a CUDA graph, replayed with what the inputs hold by then."""

from __future__ import annotations

import cupy
import pytest

from tests.cuda.calls import CALLS, assert_same, expected, inputs


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_is_replayed_with_other_inputs(name: str) -> None:
    arrays = inputs(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()  # of the graph alone: what the call frees, workspaces, stays the graph's
    with cupy.cuda.using_allocator(pool.malloc), stream:
        CALLS[name](*arrays)  # compiles and loads, which a capture does not allow
        stream.begin_capture()
        results = CALLS[name](*arrays)
        graph = stream.end_capture()
    for seed in (1, 2):
        fresh = inputs(seed)
        with stream:
            for array, value in zip(arrays, fresh, strict=True):
                cupy.copyto(array, value)
            for result in results:
                result.fill(0)
            graph.launch()
            got = [cupy.asnumpy(result) for result in results]
        assert_same(got, expected(name, fresh))
