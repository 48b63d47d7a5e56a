"""Bytes of a plan's launches, by hand for small problems; tests/test_io_model_exact.py holds them to the emulator."""

from dataclasses import replace

import pytest

from cuflash.errors import InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import arch_named
from cuflash.plan.config import ForwardConfig
from cuflash.plan.forward import plan_forward
from cuflash.plan.traffic import forward_traffic, query_tiles
from cuflash.problem import Problem

PROBLEM = Problem(2, 100, 70, 4, 2, 32, 48, "float16", 1.0)
CONFIG = ForwardConfig(
    dtype="float16", bias_dtype="none", head_dim=32, head_dim_v=48, block_m=64, block_n=32, block_dv=48, num_warps=4,
    num_stages=1, q_in_registers=False, load_bytes=16, store_bytes=16, windowed=False, softcapped=False, varlen=False,
    split=False,
)  # fmt: skip


def traffic(problem, config=CONFIG, num_splits=None, **keywords):
    options = Options(config=config, num_splits=num_splits)
    plan = plan_forward(problem, arch_named("sm_80"), load_bytes=16, store_bytes=16, options=options)
    return forward_traffic(problem, plan, **keywords)


def test_dense():
    (launch,) = traffic(PROBLEM, return_lse=True)
    heads, tiles = 2 * 4, 2
    assert launch.read == {
        "q": heads * 100 * 32 * 2,
        "k": heads * tiles * 70 * 32 * 2,
        "v": heads * tiles * 70 * 48 * 2,
    }
    assert launch.written == {"o": heads * 100 * 48 * 2, "lse": heads * 100 * 4}


def test_only_visible_keys_are_read():
    problem = replace(PROBLEM, seqlen_q=64, seqlen_k=200, left=10, right=0)
    (launch,) = traffic(problem, replace(CONFIG, windowed=True))
    assert launch.read["k"] == 8 * (64 + 10) * 32 * 2


def test_bias_is_read_for_visible_keys():
    problem = replace(PROBLEM, bias_dtype="float32")
    (launch,) = traffic(problem, replace(CONFIG, bias_dtype="float32"))
    assert launch.read["bias"] == 8 * 100 * 70 * 4


def test_each_chunk_of_columns_reads_queries_and_keys_again():
    problem = replace(PROBLEM, head_dim_v=300)
    (launch,) = traffic(problem, replace(CONFIG, head_dim_v=300, block_dv=160))
    assert launch.read["k"] == 2 * 8 * 2 * 70 * 32 * 2
    assert launch.read["v"] == 8 * 2 * 70 * 300 * 2


def test_a_split_without_tiles_reads_no_queries_but_writes_its_state():
    forward, combine = traffic(PROBLEM, replace(CONFIG, split=True, store_bytes=8), 5)
    rows = 8 * 100
    assert forward.read["q"] == 3 * rows * 32 * 2  # three key tiles for five splits
    assert forward.written == {"o_partial": 5 * rows * 48 * 4, "lse_partial": 5 * rows * 4}
    assert combine.read == forward.written
    assert combine.written == {"o": rows * 48 * 2}


def test_packed_blocks_search_their_sequence():
    problem = replace(PROBLEM, batch=2, seqlen_q=64, seqlen_k=9, total_q=64, total_k=9)
    (launch,) = traffic(problem, replace(CONFIG, varlen=True), cu_seqlens_q=[0, 64, 64], cu_seqlens_k=[0, 9, 9])
    # Slots 0 and 1 are sequence 0's, slot 2 is sequence 1's, slot 3 that of the tokens past both.
    assert launch.read["cu_seqlens_k"] == 4 * 4 * (2 + 2 + 2 + 1)
    with pytest.raises(InvalidValueError, match="cu_seqlens_q = None: must list the 3 ends"):
        traffic(problem, replace(CONFIG, varlen=True))


def test_tiles_cover_every_query():
    for lengths in ((1, 1), (64, 64), (65, 10), (200, 0)):
        tiles = list(query_tiles(PROBLEM, CONFIG, *lengths))
        assert sum(tile.rows for tile in tiles) == lengths[0]
        assert all(tile.keys == lengths[1] for tile in tiles)
