"""Who gets a turn: loops that wait for another lane, warp or block end; loops that wait for nobody are a fault."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash.emulator import Deadlock, Race, progress
from tests.emulator.programs import run_cuda

ORDERS = pytest.mark.parametrize("warp_order", [None, 0, 1])

# What a warp, a lane or a block waits for, in words of the loop: flag is set by a lane at a higher program counter.
LOADS = {
    "volatile": "asm volatile('ld.volatile.SPACE.u32 %0, [%1];' : '=r'(v) : 'l'(flag) : 'memory');",
    "relaxed": "asm volatile('ld.relaxed.gpu.SPACE.u32 %0, [%1];' : '=r'(v) : 'l'(flag) : 'memory');",
    "acquire": "asm volatile('ld.acquire.gpu.SPACE.u32 %0, [%1];' : '=r'(v) : 'l'(flag) : 'memory');",
    "atomic": "asm volatile('atom.SPACE.add.u32 %0, [%1], 0;' : '=r'(v) : 'l'(flag) : 'memory');",
    "exchange": "asm volatile('atom.SPACE.cas.b32 %0, [%1], 7, 8;' : '=r'(v) : 'l'(flag) : 'memory');",
}
SET = "asm volatile('st.release.gpu.SPACE.u32 [%0], 1;' :: 'l'(flag) : 'memory');"


def spin(load: str, space: str, waits: str, sets: str) -> str:
    text = """
    extern "C" __global__ void kernel(unsigned* g, int* y) {
      __shared__ unsigned s; unsigned v, i = threadIdx.x;
      unsigned long long flag = POINTER;
      if (i == 0 && SHARED) s = 0;
      __syncthreads();
      if (WAITS) { do { LOAD } while (v == 0); y[blockIdx.x * blockDim.x + i] = 5; }
      else { int n = i; for (int k = 0; k < 100; k++) n = n * 3 % 17 + y[blockIdx.x * blockDim.x + i];
        if (SETS) { SET } y[blockIdx.x * blockDim.x + i] = 6 + (n > 100); }
    }
    """
    pointer = "__cvta_generic_to_shared(&s)" if space == "shared" else "(unsigned long long)g"
    for name, value in {
        "LOAD": LOADS[load],
        "SETS": sets,
        "SET": SET,
        "WAITS": waits,
        "POINTER": pointer,
        "SHARED": str(int(space == "shared")),
        "SPACE": space,
    }.items():
        text = text.replace(name, value)
    return text.replace("'", '"')


def run(source: str, grid: int = 1, block: int = 64, **device: object) -> np.ndarray:
    arrays = {"g": np.zeros(1, np.uint32), "y": np.zeros((grid, block), np.int32)}
    return run_cuda(source, arrays, grid=grid, block=block, **device)[0]["y"]


@ORDERS
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_warp_waits_for_another(space: str, load: str, warp_order: int | None) -> None:
    y = run(spin(load, space, "i < 32", "i == 40"), warp_order=warp_order)
    assert (y[0, :32] == 5).all()
    assert (y[0, 32:] == 6).all()


@ORDERS
@pytest.mark.parametrize("load", LOADS)
def test_lanes_wait_for_a_lane_of_their_own_warp(load: str, warp_order: int | None) -> None:
    y = run(spin(load, "shared", "i != 17", "i == 17"), block=32, warp_order=warp_order)
    assert y[0].tolist() == [5] * 17 + [6] + [5] * 14


@ORDERS
def test_blocks_wait_for_a_later_block(warp_order: int | None) -> None:
    y = run(spin("acquire", "global", "blockIdx.x < 6", "blockIdx.x == 6 && i == 0"), grid=8, warp_order=warp_order)
    assert (y[:6] == 5).all()
    assert (y[6:] == 6).all()


@pytest.mark.parametrize("warp_order", [None, 1])
@pytest.mark.parametrize("load", ["acquire", "exchange"])
@pytest.mark.parametrize("waits", ["i < 32", "true", "i % 3 == 0", "i == 63"])
def test_waiting_for_nobody_is_a_deadlock(waits: str, load: str, warp_order: int | None) -> None:
    started = time.perf_counter()
    with pytest.raises(Deadlock, match=r"repeat the same instructions for ever .*nothing that they wait for") as fault:
        run(spin(load, "shared", waits, "false"), warp_order=warp_order)
    assert time.perf_counter() - started < 10
    assert fault.value.ptx_text.split(".")[0] in ("ld", "atom")
    assert fault.value.source.endswith("test.cu:7")
    assert fault.value.thread == (63 if waits == "i == 63" else 0, 0, 0)
    assert fault.value.block == (0, 0, 0)


def test_waiting_at_a_barrier_again_and_again_is_a_deadlock() -> None:
    source = """
    extern "C" __global__ void kernel(volatile unsigned* g, int* y) {
      float f = 0.0f / *g;
      while (*g == 0) { __syncthreads(); }
      y[threadIdx.x] = f;
    }
    """
    with pytest.raises(Deadlock, match="nothing that they wait for"):
        run(source)


def test_a_loop_without_any_state_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match=r"test.cu:2") as fault:
        run('extern "C" __global__ void kernel(unsigned* g, int* y) {\nasm volatile("here: bra here;"); }')
    assert fault.value.threads == 64


def test_a_loop_that_counts_while_it_waits_ends_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIMIT", 20000)
    source = """
    extern "C" __global__ void kernel(volatile unsigned* g, int* y) {
      int n = 0;
      while (*g == 0) n++;
      y[threadIdx.x] = n;
    }
    """
    with pytest.raises(Deadlock, match="has not ended after 20000 turns"):
        run(source)


def test_long_loops_that_come_to_an_end_are_none() -> None:
    """A loop that counts, and one whose end depends on the clock."""
    source = """
    extern "C" __global__ void kernel(unsigned* g, int* y) {
      unsigned n = 1;
      #pragma unroll 1
      for (int k = 0; k < 20000; k++) n = n * 5 % 1000003;
      long long t = clock64();
      while (clock64() - t < 6000) { }
      y[threadIdx.x] = n;
    }
    """
    assert (run(source) == pow(5, 20000, 1000003)).all()


# --- what flags order

PASS = """
extern "C" __global__ void kernel(unsigned* g, int* y) {
  __shared__ int data[32]; __shared__ unsigned s; unsigned v, i = threadIdx.x;
  unsigned long long flag = __cvta_generic_to_shared(&s);
  if (i == 0) s = 0;
  __syncthreads();
  if (i < 32) {
    data[i] = i * i;
    __syncwarp();
    if (i == 0) { BEFORE asm volatile("STORE.shared.u32 [%0], 1;" :: "l"(flag) : "memory"); AFTER }
    y[i] = 0;
  } else {
    do { asm volatile("LOAD.shared.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory"); } while (v == 0);
    THEN
    y[i] = data[63 - i];
  }
}
"""
FENCE = "__threadfence_block();"


@ORDERS
@pytest.mark.parametrize(
    ("store", "load", "before", "then"),
    [
        ("st.release.cta", "ld.acquire.cta", "", ""),
        ("st.volatile", "ld.volatile", FENCE, FENCE),
        ("st.relaxed.cta", "ld.acquire.gpu", FENCE, ""),
        ("st.release.cta", "ld.relaxed.cta", "", FENCE),
    ],
)
def test_a_flag_hands_data_over(store: str, load: str, before: str, then: str, warp_order: int | None) -> None:
    names = {"STORE": store, "LOAD": load, "BEFORE": before, "THEN": then, "AFTER": ""}
    source = PASS
    for name, text in names.items():
        source = source.replace(name, text)
    assert run(source, warp_order=warp_order)[0, 32:].tolist() == [k * k for k in range(31, -1, -1)]
    for missing in [name for name in ("BEFORE", "THEN") if names[name]]:
        source = PASS
        for name, text in (names | {missing: ""}).items():
            source = source.replace(name, text)
        with pytest.raises(Race, match="races with a write by thread"):
            run(source, warp_order=warp_order)


def test_a_fence_after_the_flag_orders_nothing() -> None:
    source = PASS.replace("STORE", "st.volatile").replace("LOAD", "ld.volatile").replace("THEN", FENCE)
    with pytest.raises(Race, match="races with a write by thread"):
        run(source.replace("BEFORE", "").replace("AFTER", FENCE))


def test_a_plain_flag_is_a_race() -> None:
    source = PASS.replace("STORE", "st").replace("LOAD", "ld.volatile").replace("THEN", FENCE).replace("AFTER", "")
    with pytest.raises(Race):
        run(source.replace("BEFORE", FENCE))


def test_a_turn_in_which_lanes_only_come_together_repeats_nothing() -> None:
    registers, nobody = [np.arange(3)], np.full((1, 1), -1)
    barriers = SimpleNamespace(waiting=nobody, arrived=nobody)
    machine: Any = SimpleNamespace(changes=0, turns=0, uniform=5, registers=registers, barriers=barriers)
    machine.places = lambda: np.full((1, 1, 32), 5)
    watch = progress.Watch(machine)
    for machine.turns in range(4):
        watch.look()
