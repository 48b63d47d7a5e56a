"""The cost model: standard and chunked attention against a count by hand, rooflines, GPUs, errors."""

import itertools
from dataclasses import replace

import pytest

from cuflash import io_model
from cuflash.errors import InvalidValueError
from cuflash.plan.arch import ARCHS
from cuflash.plan.gpus import GPUS, gpu_named
from cuflash.problem import Problem

PROBLEM = Problem(2, 100, 70, num_heads=6, num_kv_heads=2, head_dim=40, head_dim_v=24, dtype="bfloat16", scale=1.0)
PACKED = replace(PROBLEM, batch=3, total_q=160, total_k=130)
SEQLENS = [(60, 30), (0, 70), (100, 30)]
ENDS = {"cu_seqlens_q": [0, 60, 60, 160], "cu_seqlens_k": [0, 30, 100, 130]}

# Operations per clock and multiprocessor of dense 16-bit matrix products summed in float32.
MATMUL_PER_CLOCK = {"sm_80": 2048, "sm_86": 512, "sm_89": 512, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
DOUBLE_PER_CLOCK = {"sm_80": 128, "sm_86": 4, "sm_89": 4, "sm_90": 256, "sm_100": 128, "sm_120": 4}  # of float64


def sequences(problem):
    return SEQLENS if problem.varlen else [(problem.seqlen_q, problem.seqlen_k)] * problem.batch


@pytest.mark.parametrize("problem", [PROBLEM, PACKED], ids=["dense", "packed"])
def test_standard_moves_every_operand_of_three_operations_once(problem):
    read, written = 0, 0
    for n, m in sequences(problem):
        for head in range(6):
            owns_kv = head % problem.group == 0  # the heads of a group share keys and values
            read += 2 * (n * 40 + (m * 40 if owns_kv else 0))  # S = QK^T
            written += 2 * n * m
            read += 2 * n * m  # P = softmax(S)
            written += 2 * n * m
            read += 2 * (n * m + (m * 24 if owns_kv else 0))  # O = PV
            written += 2 * n * 24
    cost = io_model.standard(problem, **ENDS)
    assert (cost.bytes_read, cost.bytes_written) == (read, written)
    assert cost.bytes == cost.dram_bytes == read + written
    assert cost.matmul_flops == cost.useful_flops == 6 * sum(2 * n * m * 64 for n, m in sequences(problem))


@pytest.mark.parametrize("problem", [PROBLEM, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize(("query_chunk", "key_chunk"), [(100, 70), (64, 32), (1, 1), (33, 71), (1024, 4096)])
def test_chunked_moves_every_operand_of_every_chunk(problem, query_chunk, key_chunk):
    total = 0
    for n, m in sequences(problem):
        for head in range(6):
            for rows in chunks(n, query_chunk):
                for keys in chunks(m, key_chunk):
                    total += 2 * rows * 40 + 4 * 2 * rows * keys  # Q, and S and P there and back
                    total += 2 * keys * 64 if head % problem.group == 0 else 0  # K and V
                    total += 2 * 4 * rows * (24 + 2)  # the summary there and back
                total += 2 * rows * 24  # O
    cost = io_model.chunked(problem, query_chunk, key_chunk, **ENDS)
    assert cost.bytes == cost.dram_bytes == total


def chunks(length, size):
    return [min(size, length - begin) for begin in range(0, length, size)]


@pytest.mark.parametrize("problem", [PROBLEM, PACKED], ids=["dense", "packed"])
def test_standard_backward_moves_every_operand_of_five_operations_once(problem):
    read, written = 0, 0
    for n, m in sequences(problem):
        for head in range(6):
            kv = m if head % problem.group == 0 else 0  # the heads of a group share keys and values
            read += 2 * (n * m + n * 24)  # dV = P^T dO
            written += 2 * kv * 24
            read += 2 * (n * 24 + kv * 24)  # dP = dO V^T
            written += 2 * n * m
            read += 2 * 2 * n * m  # dS of P and dP
            written += 2 * n * m
            read += 2 * (n * m + kv * 40)  # dQ = dS K
            written += 2 * n * 40
            read += 2 * (n * m + n * 40)  # dK = dS^T Q
            written += 2 * kv * 40
    cost = io_model.standard_backward(problem, **ENDS)
    assert (cost.bytes_read, cost.bytes_written) == (read, written)
    assert cost.matmul_flops == 6 * sum(2 * n * m * 128 for n, m in sequences(problem))
    assert cost.useful_flops == 6 * sum(2 * n * m * (3 * 40 + 2 * 24) for n, m in sequences(problem))
    assert cost.workspace_bytes == 3 * 2 * 6 * sum(n * m for n, m in sequences(problem))


def test_cotangent_of_lse_softcap_and_bias_of_the_standard_backward_are_counted():
    plain = io_model.standard_backward(PROBLEM)
    scores = 2 * 6 * 100 * 70
    biased = io_model.standard_backward(replace(PROBLEM, bias_dtype="float32"), bias_shape=(1, 6, 1, 70))
    assert biased.bytes - plain.bytes == 2 * scores + 4 * 6 * 70
    capped = io_model.standard_backward(replace(PROBLEM, softcap=3.0), lse_cotangent=True)
    assert capped.bytes - plain.bytes == 2 * scores + 4 * 2 * 6 * 100
    assert capped.workspace_bytes - plain.workspace_bytes == 2 * scores


def test_wider_elements_cost_more():
    for algorithm in (io_model.standard, io_model.chunked, io_model.standard_backward):
        narrow, single, double = (algorithm(replace(PROBLEM, dtype=d)) for d in ("float16", "float32", "float64"))
        assert double.bytes == 2 * single.bytes
        assert single.matmul_flops == 3 * double.matmul_flops == 3 * narrow.matmul_flops  # of split operands
        assert double.exponentials == 0


def test_bias_and_lse_are_counted():
    biased = replace(PROBLEM, bias_dtype="float32")
    for algorithm in (io_model.standard, io_model.chunked):
        plain, with_both = algorithm(PROBLEM), algorithm(biased, return_lse=True)
        assert with_both.read["bias"] == 4 * 2 * 6 * 100 * 70
        assert with_both.written["lse"] == 4 * 2 * 6 * 100
        assert with_both.bytes - plain.bytes == with_both.read["bias"] + with_both.written["lse"]


def test_useful_operations_are_those_of_visible_pairs():
    for left, right in itertools.product((None, 0, 5, 200), repeat=2):
        problem = replace(PROBLEM, left=left, right=right)
        pairs = sum(
            (left is None or j >= i - 30 - left) and (right is None or j <= i - 30 + right)
            for i in range(100)
            for j in range(70)
        )
        assert io_model.standard(problem).useful_flops == 2 * 12 * pairs * 64


def test_chunks_need_the_memory_that_rabe_and_staats_report():
    """At 2^14 queries, one head, float32, D = 64 they measure 59 times less memory than standard attention."""
    problem = Problem(1, 2**14, 2**14, 1, 1, 64, 64, "float32", 0.125)
    ratio = io_model.standard(problem).workspace_bytes / io_model.chunked(problem).workspace_bytes
    assert 55 < ratio < 65


def test_compulsory_bytes_are_inputs_and_outputs_once():
    full = io_model.compulsory_bytes(PROBLEM, return_lse=True)
    assert full == 2 * 2 * (100 * 6 * 64 + 70 * 2 * 64) + 4 * 2 * 6 * 100
    # Causal with 100 queries and 70 keys: every key is seen; with a window of 10 past keys and 30 queries, 40 are.
    assert io_model.compulsory_bytes(replace(PROBLEM, right=0)) == full - 4 * 2 * 6 * 100
    windowed = io_model.compulsory_bytes(replace(PROBLEM, seqlen_q=30, left=10, right=0))
    assert windowed == 2 * 2 * (30 * 6 * 64 + 40 * 2 * 64)
    biased = replace(PROBLEM, bias_dtype="float16")
    assert io_model.compulsory_bytes(biased, bias_elements=70) == io_model.compulsory_bytes(PROBLEM) + 2 * 70


def test_compulsory_bytes_of_a_pullback_are_inputs_cotangents_and_gradients_once():
    rows, keys = 2 * 100 * 6 * 64 * 2, 2 * 70 * 2 * 64 * 2
    full = io_model.compulsory_backward_bytes(PROBLEM)
    assert full == 2 * rows + 2 * keys + 4 * 2 * 6 * 100  # q, dq, out and its cotangent; k, v, dk, dv; lse
    assert io_model.compulsory_backward_bytes(PROBLEM, lse_cotangent=True) == full + 4 * 2 * 6 * 100
    biased = replace(PROBLEM, bias_dtype="float16")
    assert io_model.compulsory_backward_bytes(biased, bias_shape=(1, 1, 1, 70)) == full + 2 * 2 * 70


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_workspaces_of_a_pullback_are_linear_in_the_queries(dtype):
    """Of each query a row of sums of dq, its lse and delta; nothing of the keys."""

    def workspace(seqlen_q, seqlen_k):
        problem = io_model.problem_of_shapes((seqlen_q, 3, 64), (seqlen_k, 3, 64), dtype=dtype)
        return io_model.workspace_bytes(io_model.plan_backward_contiguous(problem, ARCHS["sm_90"]))

    tile = workspace(128, 128)
    assert all(workspace(128 * n, m) == n * tile for n, m in ((2, 1), (5, 100), (1024, 2**20)))
    assert all(workspace(n, 50) <= tile for n in (1, 17, 65, 100, 127))
    wide = 8 if dtype == "float64" else 4
    assert 3 * 128 * (64 + 2) * wide < tile < 1.01 * 3 * 128 * (64 + 2) * wide
    cost = io_model.compare((2**16, 3, 64), backward=True, dtype=dtype, arch="sm_90")
    assert cost["flash"].workspace_bytes == 512 * tile
    assert cost["standard"].workspace_bytes > 100 * cost["flash"].workspace_bytes


def test_roofline_names_the_slowest_part():
    cost = io_model.standard(PROBLEM)
    gpu = gpu_named("A100")
    line = cost.roofline(gpu)
    assert line.memory == pytest.approx(cost.bytes / 2.039e12)
    assert line.matmul == pytest.approx(cost.matmul_flops / 312e12)
    assert line.special == pytest.approx(2 * 6 * 100 * 70 / (16 * 108 * 1.41e9))
    assert (line.bound, line.seconds) == ("memory", line.memory)
    assert replace(cost, dram_bytes=0).roofline(gpu).bound == "special"
    assert replace(cost, dram_bytes=0, exponentials=0).roofline(gpu).bound == "matmul"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_rates_follow_from_multiprocessors_and_clock(gpu):
    assert gpu.matmul_rate == pytest.approx(gpu.sm_count * gpu.clock * MATMUL_PER_CLOCK[gpu.arch_name], rel=0.01)
    # The vendor states the rate of float64 at a higher clock than that of the others.
    clocks = gpu.sm_count * gpu.clock
    assert gpu.product_rate("float64") == pytest.approx(clocks * DOUBLE_PER_CLOCK[gpu.arch_name], rel=0.1)
    assert gpu.product_rate("float32") == gpu.product_rate("tf32") == gpu.product_rate("float16") / 2
    assert gpu.arch is ARCHS[gpu.arch_name]
    assert gpu_named(f" {gpu.name[:3]} - {gpu.name[3:]}".lower()) is gpu


def test_every_architecture_has_a_gpu():
    for arch in ARCHS:
        assert arch in {gpu.arch_name for gpu in GPUS.values()}


def test_errors_name_argument_value_and_requirement():
    with pytest.raises(InvalidValueError, match="gpu = 'H300': must be one of A100, H100"):
        gpu_named("H300")
    with pytest.raises(InvalidValueError, match="query_chunk = 0: must be >= 1"):
        io_model.chunked(PROBLEM, query_chunk=0)
    with pytest.raises(InvalidValueError, match="cu_seqlens_q = None: must list the 4 ends of packed sequences"):
        io_model.standard(PACKED)
