"""The choice of backward configurations: pure, bounded by the architecture, independent of lengths."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cuflash.errors import ConfigError, InvalidTypeError, InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import ARCHS, Arch, arch_named
from cuflash.plan.backward import BackwardPlan, plan_backward, ranked_backward_configs
from cuflash.plan.backward_cost import blocks_per_sm, column_chunks, fits, shared_bytes
from cuflash.plan.config import BackwardConfig, BiasGradientConfig, FinishConfig, PrepareConfig
from cuflash.plan.forward import FEW_ROWS
from cuflash.problem import Problem

SM80 = arch_named("sm_80")
LONG = Problem(4, 4096, 4096, 16, 4, 128, 128, "bfloat16", 0.1)


def plan(problem: Problem, arch: Arch = SM80, options: Options | None = None, **keywords) -> BackwardPlan:
    keywords = {"load_bytes": 16, "store_bytes": 16} | keywords
    return plan_backward(problem, arch, options=options, **keywords)


def config_of(*arguments, **keywords) -> BackwardConfig:
    return plan(*arguments, **keywords).launches[1].config


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [1, 17, 64, 100, 128, 200, 256, 320, 512])
@pytest.mark.parametrize("head_dim_v", [1, 64, 130, 257, 512])
@pytest.mark.parametrize("seqlen_q", [1, 1000])
def test_every_head_dim_fits_every_architecture(arch, head_dim, head_dim_v, seqlen_q):
    problem = replace(
        LONG, head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=seqlen_q, right=0, softcap=1.0, bias_dtype="float32"
    )
    planned = plan(problem, ARCHS[arch], load_bytes=2, store_bytes=2, bias_shape=(4, 16, seqlen_q, 4096))
    for launch in planned.launches:
        assert launch.shared_bytes == shared_bytes(launch.config) <= ARCHS[arch].shared_per_block
    config = planned.launches[1].config
    assert fits(config, ARCHS[arch])
    assert blocks_per_sm(config, ARCHS[arch]) >= 1


def test_the_plan_is_a_pure_function():
    assert plan(LONG) == plan(LONG)
    assert hash(plan(LONG)) == hash(plan(LONG))


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen_q": 777}, {"seqlen_k": 1}, {"batch": 9}, {"num_heads": 64}, {"num_kv_heads": 1}, {"scale": 3.0},
        {"left": 5, "right": 0},
    ],
    ids=str,
)  # fmt: skip
def test_no_length_chooses_a_configuration(change):
    like = replace(LONG, right=0) if "left" in change else LONG
    assert config_of(replace(LONG, **change)) == config_of(like)


def test_few_queries_have_tiles_of_their_own():
    configs = {n: config_of(replace(LONG, seqlen_q=n)) for n in (1, FEW_ROWS, FEW_ROWS + 1, 4096)}
    assert configs[1] == configs[FEW_ROWS]
    assert configs[FEW_ROWS + 1] == configs[4096]
    assert configs[1].block_m == 16 < configs[4096].block_m


@pytest.mark.parametrize(
    "change",
    [{"right": 0}, {"softcap": 2.0}, {"bias_dtype": "float16"}, {"dtype": "float16"}, {"head_dim_v": 64}],
    ids=str,
)
def test_what_the_kernels_are_compiled_for_follows_the_problem(change):
    config = config_of(replace(LONG, **change))
    assert config.windowed == ("right" in change)
    assert config.softcapped == ("softcap" in change)
    assert config.bias_dtype == change.get("bias_dtype", "none")
    assert config.dtype == change.get("dtype", "bfloat16")
    assert config.head_dim_v == change.get("head_dim_v", 128)
    assert config.deterministic
    assert not config_of(replace(LONG, **change), options=Options(deterministic=False)).deterministic


def test_kernels_before_and_after_are_the_same_for_all_masks():
    masked = plan(replace(LONG, right=0, softcap=2.0, bias_dtype="float16"), options=Options(deterministic=False))
    for launch in (masked.launches[0], masked.launches[2]):
        config = launch.config
        assert type(config) in (PrepareConfig, FinishConfig)
        assert (config.windowed, config.softcapped, config.bias_dtype) == (False, False, "none")


def test_grids_and_workspaces_of_a_dense_problem():
    problem = replace(LONG, seqlen_q=1000, seqlen_k=3000)
    planned = plan(problem)
    config = planned.launches[1].config
    q_tiles, k_tiles, chunks = -(-1000 // config.block_m), -(-3000 // config.block_n), column_chunks(config)
    assert (planned.q_tiles, planned.k_tiles) == (q_tiles, k_tiles)
    blocks = [launch.grid[0] for launch in planned.launches]
    assert blocks == [q_tiles * 16 * 4, k_tiles * 4 * 4 * chunks, q_tiles * 16 * 4 * chunks]
    assert planned.row_shape == (4, 16, q_tiles * config.block_m)
    assert planned.turn_shape == planned.sum_shape[:-1] == (4, 16, q_tiles, chunks)
    assert planned.sum_shape[-1] >= config.block_m * config.block_d


def test_grids_and_workspaces_of_a_packed_problem():
    """Slots for a tile that each sequence begins, and for the tokens of none."""
    problem = replace(LONG, batch=7, seqlen_q=300, seqlen_k=400, total_q=1000, total_k=1500)
    planned = plan(problem)
    config = planned.launches[1].config
    assert planned.q_tiles == 1000 // config.block_m + 8
    assert planned.k_tiles == 1500 // config.block_n + 8
    blocks = [launch.grid[0] for launch in planned.launches]
    assert blocks == [planned.q_tiles * 16, planned.k_tiles * 4, planned.q_tiles * 16]
    assert planned.row_shape == (1, 16, planned.q_tiles * config.block_m)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 512, "head_dim_v": 512}, {"head_dim": 65}], ids=str)
def test_workspaces_are_linear_in_the_lengths(changes):
    problem = replace(LONG, **changes)
    once = plan(problem)
    twice = plan(replace(problem, seqlen_q=8192, seqlen_k=8192))
    for shape in ("row_shape", "sum_shape", "turn_shape"):
        assert math.prod(getattr(twice, shape)) == 2 * math.prod(getattr(once, shape))
    elements = problem.batch * problem.seqlen_q * problem.num_heads * problem.head_dim
    assert elements <= math.prod(once.sum_shape) <= 2 * elements


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((4, 16, 1000, 3000), 64), ((1, 16, 1000, 3000), 16), ((4, 1, 1, 3000), 4), ((1, 1, 1000, 1), 1), ((1,) * 4, 1)],
)
def test_a_block_for_every_tile_of_the_bias(shape, blocks):
    problem = replace(LONG, seqlen_q=1000, seqlen_k=3000, bias_dtype="float32")
    launch = plan(problem, bias_shape=shape).launches[3]
    config = launch.config
    assert isinstance(config, BiasGradientConfig)
    assert launch.grid[0] == blocks * -(-shape[2] // config.block_m) * -(-shape[3] // config.block_n)
    assert config.row_block == plan(problem).launches[1].config.block_m


def test_the_ranking_begins_with_the_plans_choice():
    ranked = ranked_backward_configs(LONG, SM80, load_bytes=16, store_bytes=16)
    assert next(config for config in ranked if fits(config, SM80)) == config_of(LONG)
    assert len(ranked) == len(set(ranked)) > 10


def explicit(**changes) -> Options:
    return Options(backward_config=replace(config_of(LONG), **changes))


def test_an_explicit_configuration_is_taken():
    options = explicit(num_stages=1)
    assert config_of(LONG, options=options) == options.backward_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 64, "block_d": 64}, r"options.backward_config.head_dim = 64: must be 128, as the problem has it"),
        ({"windowed": True}, "options.backward_config.windowed = True: must be False, as the problem has it"),
        ({"deterministic": False}, "deterministic = False: must be True, as options.deterministic is"),
    ],
)
def test_an_explicit_configuration_must_fit_the_problem(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(LONG, options=explicit(**changes))


def test_an_explicit_configuration_must_fit_the_rows_and_the_architecture():
    with pytest.raises(ConfigError, match="load_bytes = 16: must be at most 4, the rows' alignment"):
        plan(LONG, options=explicit(), load_bytes=4)
    large = explicit(block_m=128, block_n=128, num_warps=8, key_warps=8, num_stages=2)
    with pytest.raises(ConfigError, match="bytes of shared memory, must be at most 101376 on sm_86"):
        plan(LONG, ARCHS["sm_86"], options=large)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": 48}, "block_m = 48: must be 16, 32, 64 or 128"),
        ({"block_n": 24}, "block_n = 24: must be a multiple of 16"),
        ({"block_d": 96}, "block_d = 96: must be 128, the head dimension in steps of 16, or a smaller multiple of 64"),
        ({"block_dv": 256}, "block_dv = 256: must be 128"),
        ({"num_warps": 8, "key_warps": 1, "block_m": 128, "block_d": 64}, "block_d = 64: must be .* multiple of 128"),
        ({"num_warps": 3}, "num_warps = 3: must be 1, 2, 4 or 8"),
        ({"num_stages": 3}, "num_stages = 3: must be 1 or 2"),
        ({"dtype": "int8"}, "dtype = 'int8': must be"),
        ({"load_bytes": 32}, r"load_bytes = 32: must be one of \(2, 4, 8, 16\)"),
        ({"store_bytes": 3}, r"store_bytes = 3: must be one of \(2, 4, 8, 16\)"),
        ({"head_dim": 513}, "head_dim = 513: must be 1 to 512"),
    ],
    ids=str,
)
def test_a_configuration_checks_itself(changes, message):
    with pytest.raises(ConfigError, match=rf"BackwardConfig\.{message}"):
        replace(config_of(LONG), **changes)


def test_options_check_themselves():
    with pytest.raises(InvalidTypeError, match=r"options.deterministic = 1: must be True or False"):
        Options(deterministic=1)
    with pytest.raises(InvalidTypeError, match=r"options.backward_config = .*: must be a BackwardConfig or None"):
        Options(backward_config=plan(LONG).launches[0].config)


def test_a_grid_that_is_too_large():
    with pytest.raises(InvalidValueError, match=r"blocks: must be at most 2.*31 - 1; ask for fewer rows in one call"):
        plan(replace(LONG, batch=2**20, num_heads=2**10))
