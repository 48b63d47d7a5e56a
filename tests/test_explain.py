"""`python -m cuflash explain`: what it prints, and what it says of wrong arguments."""

import re

import pytest

from cuflash import cli, io_model, masks
from cuflash.plan.gpus import gpu_named


@pytest.fixture
def explain(capsys, monkeypatch):
    """Run the command; (exit status, output, errors)."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        status = cli.main(["explain", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_everything_is_printed(explain):
    status, out, err = explain("--shape", "4,4096,32,128", "--kv-shape", "4,4096,8,128", "--causal", "--gpu", "H200")
    assert (status, err) == (0, "")
    for word in (
        "queries 4096, keys 4096, heads 32 (8 of keys), dim 128, bfloat16, causal on H200 (sm_90)",
        "cuflash_forward_d128_128",
        "tiles",
        "shared memory",
        "registers",
        "occupancy",
        "waves",
        "splits of the keys",
        "standard",
        "chunked",
        "flash",
        "matrix products",
        "TFLOP/s of visible pairs",
    ):
        assert word in out, word


def test_figures_are_those_of_the_model(explain):
    shape = (2, 1024, 4, 64)
    gpu = gpu_named("A100")
    plan = io_model.plan_contiguous(io_model.problem_of_shapes(shape), gpu.arch)
    _, out, _ = explain("--shape", "2,1024,4,64", "--gpu", "a100")
    config = plan.forward.config
    assert f"{config.block_m} queries x {config.block_n} keys" in out
    assert f"{plan.forward.shared_bytes:,} of 166,912 bytes" in out
    costs = io_model.compare(shape, arch="sm_80")
    ratio = costs["standard"].bytes / costs["flash"].bytes
    assert f"{ratio:,.2f} times the bytes of flash" in out
    times = [f"{cost.roofline(gpu).seconds * 1e6:,.1f}" for cost in costs.values()]
    assert re.search(r"least time.*" + r".*".join(map(re.escape, times)), out)


def test_split_keys_show_both_kernels(explain):
    status, out, _ = explain("--shape", "1,64,2,64", "--kv-shape", "1,8192,2,64", "--num-splits", "8")
    assert status == 0
    assert re.search(r"splits of the keys\W+8", out)
    assert "cuflash_combine_d64" in out


def test_the_backward_pass(explain):
    arguments = ["--shape", "2,1024,4,64", "--bias-shape", "1024", "--gpu", "h200"]
    status, out, err = explain(*arguments, "--backward")
    assert (status, err) == (0, "")
    for family in ("prepare", "backward", "finish", "bias_gradient"):
        assert f"cuflash_{family}_d64_64" in out
    for word in ("H200 (sm_90), backward", "stage(s) of queries", "sums of dq", "occupancy", "standard", "flash"):
        assert word in out, word
    assert "chunked" not in out
    gpu = gpu_named("H200")
    costs = io_model.compare((2, 1024, 4, 64), bias_shape=(1024,), backward=True, arch="sm_90")
    ratio = costs["standard"].bytes / costs["flash"].bytes
    assert f"{ratio:,.2f} times the bytes of flash" in out
    times = [f"{cost.roofline(gpu).seconds * 1e6:,.1f}" for cost in costs.values()]
    assert re.search(r"least time.*" + r".*".join(map(re.escape, times)), out)


def test_a_mask(explain):
    """Its density, the kernels that list tiles, and the costs of what it leaves."""
    status, out, err = explain("--shape", "1,4096,8,64", "--mask", "butterfly=128", "--gpu", "a100")
    assert (status, err) == (0, "")
    for word in ("Butterfly(128) of density 0.1875", "cuflash_tile_rows_", "cuflash_forward_d64_64"):
        assert word in out, word
    costs = io_model.compare((1, 4096, 8, 64), mask=masks.Butterfly(128))
    assert f"{costs['standard'].bytes / costs['flash'].bytes:,.2f} times the bytes of flash" in out
    _, out, _ = explain("--shape", "1,4096,8,64", "--mask", "window=256,0", "--gpu", "a100", "--backward")
    for word in ("SlidingWindow(256, 0) of density 0.06", "cuflash_tile_rows_", "cuflash_tile_columns_"):
        assert word in out, word


def test_every_precision(explain):
    """The products of all algorithms are of the kind that is asked for, and of the rate that the GPU has for it."""
    gpu = gpu_named("A100")
    for arguments, rate in (
        (["float32"], 156e12 / 3),
        (["float32", "--precision", "tf32"], 156e12),
        (["float64"], 19.5e12),
    ):
        for more, flops in (([], 2 * 128), (["--backward"], 2 * 256)):
            status, out, _ = explain("--shape", "4096,64", "--gpu", "A100", "--dtype", *arguments, *more)
            assert status == 0
            standard = 4096**2 * flops / rate * 1e6
            assert re.search(rf"matrix product time\D+{standard:,.1f} ", out), (arguments, standard)
    assert gpu.matmul_rate == 2 * 156e12


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "100,64"],
        ["--shape", "100,2,64", "--v-shape", "100,2,32", "--dtype", "float16"],
        ["--shape", "1,100,2,64", "--window", "none,3", "--softcap", "20"],
        ["--shape", "1,100,2,64", "--window", "8,0", "--lse", "--bias-shape", "100", "--bias-dtype", "float32"],
        ["--shape", "1,1,2,512", "--kv-shape", "1,5000,1,512", "--gpu", "RTX 4090"],
        ["--shape", "1,100,2,200", "--backward", "--causal", "--softcap", "20", "--lse", "--dtype", "float64"],
        ["--shape", "3,2,64", "--backward"],
        ["--shape", "1,300,4,64", "--mask", "causal"],
        ["--shape", "1,300,4,64", "--mask", "dilated=3", "--causal", "--backward", "--bias-shape", "300"],
    ],
)
def test_every_kind_of_problem_is_explained(explain, arguments):
    status, out, err = explain(*arguments)
    assert (status, err) == (0, "")
    assert "least time" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4,x,3"], "--shape = '4,x,3': must be whole numbers and commas"),
        (["--shape", "4096"], "q.shape = (4096,): must be (seqlen, dim), (seqlen, heads, dim)"),
        (["--shape", "1,8,4,64", "--kv-shape", "1,8,3,64"], "4 heads must be a multiple of the 3 of k"),
        (["--shape", "1,8,4,64", "--kv-shape", "1,8,4,32"], "k.shape = (1, 8, 4, 32): head_dim 32 must be 64"),
        (["--shape", "1,8,4,600"], "q.shape[-1] = 600: must be 1 to 512"),
        (["--shape", "1,-8,4,64"], "q_shape[1] = -8: must be >= 0"),
        (["--shape", "1,0,4,64"], "batch, seqlen_q, num_heads = (1, 0, 4): must be >= 1 each"),
        (["--shape", "8,64", "--precision", "tf32"], "options.precision = 'tf32': must be None for bfloat16"),
        (["--shape", "8,64", "--backward", "--num-splits", "2"], "--num-splits = 2: must be left out with --backward"),
        (["--shape", "8,64", "--kv-shape", "0,64", "--backward"], "seqlen_k, num_heads = (1, 8, 0, 1): must be >= 1"),
        (["--shape", "8,64", "--dtype", "int8"], "dtype = 'int8': must be one of float16, bfloat16"),
        (["--shape", "8,64", "--window", "3"], "window = (3,): must be None or a pair (left, right)"),
        (["--shape", "8,64", "--window=-3,0"], "window[0] = -3: must be >= 0 or None"),
        (["--shape", "8,64", "--window", "a,0"], "--window = 'a,0': must be left,right"),
        (["--shape", "8,64", "--softcap", "0"], "softcap = 0.0: must be finite and > 0"),
        (["--shape", "8,64", "--bias-shape", "3,8"], "bias.shape = (3, 8): must broadcast to"),
        (["--shape", "8,64", "--num-splits", "0"], "options.num_splits = 0: must be 1 to 128"),
        (["--shape", "8,64", "--mask", "checkers"], "--mask = 'checkers': must be one of causal, window, prefix"),
        (["--shape", "8,64", "--mask", "butterfly"], "--mask = 'butterfly': must have the numbers of Butterfly"),
        (["--shape", "8,64", "--mask", "butterfly=a"], "--mask = 'butterfly=a': must have whole numbers"),
        (["--shape", "8,64", "--mask", "butterfly=3"], "block_size = 3: must be >= 16"),
        (["--shape", "8,64", "--gpu", "V100"], "gpu = 'V100': must be one of A100"),
    ],
)
def test_wrong_arguments_are_named(explain, arguments, message):
    status, out, err = explain(*arguments)
    assert (status, out) == (2, "")
    assert message in err
