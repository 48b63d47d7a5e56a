"""The choice of configurations and splits: pure, bounded by the architecture, independent of lengths."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from cuflash.errors import ConfigError, InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import ARCHS, Arch, arch_named
from cuflash.plan.config import ELEMENT_BYTES, MAX_SPLITS, ForwardConfig
from cuflash.plan.cost import blocks_per_sm, fits_registers, shared_bytes
from cuflash.plan.forward import FEW_ROWS, max_head_dim, plan_combine, plan_forward, q_tiles
from cuflash.plan.shipped import shipped_configs
from cuflash.problem import Problem

SM80 = arch_named("sm_80")
LONG = Problem(4, 4096, 4096, 16, 16, 128, 128, "bfloat16", 0.1)
DECODE = replace(LONG, batch=1, seqlen_q=1, seqlen_k=65536, num_heads=8, num_kv_heads=8, right=0)


def plan(problem: Problem, arch: Arch = SM80, options: Options | None = None, **keywords):
    keywords = {"load_bytes": 16, "store_bytes": 16} | keywords
    return plan_forward(problem, arch, options=options, **keywords)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [1, 17, 64, 100, 128, 200, 256, 320, 512])
@pytest.mark.parametrize("head_dim_v", [1, 64, 130, 257, 512])
@pytest.mark.parametrize("seqlen_q", [1, 1000])
def test_every_head_dim_fits_every_architecture(arch, head_dim, head_dim_v, seqlen_q):
    problem = replace(
        LONG, head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=seqlen_q, right=0, softcap=1.0, bias_dtype="float32"
    )
    for dtype, num_splits in product(("bfloat16", "float32", "tf32", "float64"), (1, 5)):
        if head_dim > max_head_dim(dtype, ARCHS[arch]):
            continue
        asked = Options(num_splits=num_splits, precision="tf32" if dtype == "tf32" else None)
        wide = replace(problem, dtype="float32" if dtype == "tf32" else dtype)
        access = ELEMENT_BYTES[dtype]
        launch = plan(wide, ARCHS[arch], asked, load_bytes=access, store_bytes=access).forward
        assert launch.config.dtype == dtype
        assert launch.shared_bytes == shared_bytes(launch.config) <= ARCHS[arch].shared_per_block
        assert fits_registers(launch.config, ARCHS[arch])
        assert blocks_per_sm(launch.config, ARCHS[arch]) >= 1


def test_the_plan_is_a_pure_function():
    assert plan(LONG) == plan(LONG)
    assert hash(plan(LONG)) == hash(plan(LONG))


@pytest.mark.parametrize(
    "change", [{"seqlen_q": 777}, {"seqlen_k": 0}, {"batch": 9}, {"num_heads": 64}, {"scale": 3.0}]
)
def test_no_length_chooses_a_configuration(change):
    options = Options(num_splits=1)
    assert plan(replace(LONG, **change), options=options).forward.config == plan(LONG, options=options).forward.config


@pytest.mark.parametrize(
    "change",
    [{"right": 0}, {"softcap": 2.0}, {"bias_dtype": "float16"}, {"dtype": "float16"}, {"head_dim_v": 64}],
    ids=str,
)
def test_what_the_kernel_is_compiled_for_follows_the_problem(change):
    config = plan(replace(LONG, **change)).forward.config
    assert isinstance(config, ForwardConfig)
    assert config.windowed == ("right" in change)
    assert config.softcapped == ("softcap" in change)
    assert config.bias_dtype == change.get("bias_dtype", "none")
    assert config.dtype == change.get("dtype", "bfloat16")
    assert config.head_dim_v == change.get("head_dim_v", 128)


# At 64 the fastest of all. At 128 and 256 those are (128, 64, 4, 2, False) and (128, 128, 8, 1, False), which spill.
CHOSEN_ON_H200 = {64: (128, 128, 4, 2, False), 128: (128, 48, 4, 2, False), 256: (128, 96, 8, 1, False)}


@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("head_dim", CHOSEN_ON_H200)
def test_tilings_that_were_measured_to_be_fast_and_do_not_spill_are_chosen(head_dim, right):
    problem = replace(LONG, head_dim=head_dim, head_dim_v=head_dim, right=right)
    config = plan(problem, arch_named("sm_90")).forward.config
    tiling = (config.block_m, config.block_n, config.num_warps, config.num_stages, config.q_in_registers)
    assert tiling == CHOSEN_ON_H200[head_dim]


def test_a_full_device_is_not_split_and_an_empty_one_is():
    assert plan(LONG).num_splits == 1
    assert plan(LONG).combine is None
    decode = plan(DECODE)
    assert 1 < decode.num_splits <= MAX_SPLITS
    assert decode.combine is not None
    assert decode.forward.grid == (8 * decode.num_splits, 1, 1)
    assert decode.combine.config.state_dtype == "float32"
    assert decode.combine.grid == (8, 1, 1)  # rows, each of many states


def test_few_keys_are_not_split():
    assert plan(replace(DECODE, seqlen_k=100)).num_splits == 1
    assert plan(replace(DECODE, left=50)).num_splits == 1
    assert plan(replace(DECODE, seqlen_k=0)).num_splits == 1


def test_decoding_takes_tiles_of_few_rows():
    assert plan(DECODE).forward.config.block_m == FEW_ROWS
    assert plan(replace(DECODE, seqlen_q=FEW_ROWS + 1)).forward.config.block_m > FEW_ROWS


def test_a_larger_device_is_split_more():
    assert plan(DECODE, sm_count=200).num_splits > plan(DECODE, sm_count=20).num_splits


def test_grid():
    problem = replace(LONG, seqlen_q=300, head_dim_v=300)
    launch = plan(problem).forward
    assert isinstance(launch.config, ForwardConfig)
    assert launch.grid == (-(-300 // launch.config.block_m) * 2 * 16 * 4, 1, 1)  # two chunks of output columns
    assert launch.block == (launch.config.threads, 1, 1)


def test_packed_problems_have_a_slot_for_every_tile():
    for lengths in ([], [0], [1], [64] * 5, [63, 1, 0, 129, 2], [1] * 200, [1000, 3]):
        total = sum(lengths) + 7  # tokens of no sequence
        problem = replace(LONG, batch=len(lengths), seqlen_q=max(lengths, default=0), total_q=total, total_k=9)
        for block_m in (16, 64, 128):
            starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
            first = [start // block_m + b for b, start in enumerate(starts)] + [q_tiles(problem, block_m)]
            tiles = [-(-length // block_m) for length in [*lengths, 7]]
            assert all(after - before >= n for (before, after), n in zip(pairwise(first), tiles, strict=True))


def test_an_explicit_configuration_is_taken_as_it_is():
    config = replace(plan(LONG).forward.config, block_n=16, num_stages=1)
    assert plan(LONG, options=Options(config=config)).forward.config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "options.config.dtype = 'float16': must be 'bfloat16', as the problem has it"),
        ({"head_dim": 64}, "options.config.head_dim = 64: must be 128, as the problem has it"),
        ({"windowed": True}, "options.config.windowed = True: must be False, as the problem has it"),
        ({"bias_dtype": "float32"}, "options.config.bias_dtype = 'float32': must be 'none', as the problem has it"),
        ({"block_dv": 256}, "options.config.block_dv = 256: must be at most 128"),
        ({"block_m": 512, "block_n": 256, "num_stages": 2}, "bytes of shared memory, must be at most 166912 on sm_80"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(change, message):
    config = replace(plan(LONG).forward.config, **change)
    with pytest.raises(ConfigError) as error:
        plan(LONG, options=Options(config=config))
    assert message in str(error.value)


def test_alignment_is_respected():
    config = plan(LONG).forward.config
    with pytest.raises(ConfigError, match=r"options.config.load_bytes = 16: must be at most 8"):
        plan(LONG, options=Options(config=config), load_bytes=8)
    with pytest.raises(ConfigError, match=r"options.config.store_bytes = 16: must be at most 4"):
        plan(LONG, options=Options(config=config), store_bytes=4)
    assert plan(LONG, load_bytes=4, store_bytes=2).forward.config.load_bytes == 4


def test_splits_need_a_configuration_that_splits():
    config = plan(LONG).forward.config
    with pytest.raises(ConfigError, match=r"options.config.split = False: must be True for options.num_splits = 3"):
        plan(LONG, options=Options(config=config, num_splits=3))


def test_a_grid_has_a_largest_size():
    with pytest.raises(InvalidValueError, match="blocks: must be at most"):
        plan(replace(LONG, batch=2**20, num_heads=2**10))


@pytest.mark.parametrize(("states", "dim", "blocks"), [(2, 64, 251), (8, 64, 251), (9, 64, 1001), (9, 4096, 251)])
def test_a_combine_launch_has_a_warp_for_every_row_and_of_many_states_a_block(states, dim, blocks):
    launch = plan_combine("float16", "float16", dim, 1001, num_states=states, load_bytes=16)
    assert launch.grid == (blocks, 1, 1)
    assert launch.block == (128, 1, 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_configurations_are_distinct_and_complete(arch):
    configs = shipped_configs(arch)
    assert len(configs) == len(set(configs))
    forward = [config for config in configs if isinstance(config, ForwardConfig)]
    for flag in ("windowed", "softcapped", "varlen", "split"):
        assert {getattr(config, flag) for config in forward} == {False, True}
    assert {config.head_dim for config in forward} >= {32, 64, 96, 128, 192, 256, 512}
