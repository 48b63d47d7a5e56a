"""The benchmarks run, check what they time, and say what is wrong with their arguments."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import cuflash
from benchmarks import (
    backward,
    cases,
    contenders,
    decode,
    decode_cases,
    driver,
    first_call,
    flex,
    forward,
    gpu_session,
    machine,
    measure,
    memory,
    report,
    sparse,
    sparse_cases,
)
from benchmarks.passes import PASSES

CASE = cases.Case(2, 65, 4, 2, 16, "float32", None, 0)
SPARSE_SHAPE = (2, 320, 4, 2, 16, "float32")
MASKED_CASES = [
    sparse_cases.MaskedCase(*SPARSE_SHAPE, pattern="random", amount=2),
    sparse_cases.MaskedCase(*SPARSE_SHAPE, pattern="window", amount=37),
    sparse_cases.MaskedCase(*SPARSE_SHAPE, pattern="butterfly", amount=32),
]
SPARSE_CASES = [
    *MASKED_CASES,
    sparse_cases.HashCase(*SPARSE_SHAPE, buckets=4),
    sparse_cases.KeptCase(*SPARSE_SHAPE, dropped=40),
]


@pytest.fixture
def small_machine(monkeypatch):
    """Rates of a matrix product and a copy from small arrays."""
    monkeypatch.setattr(machine, "CPU_MATRIX", 64)
    monkeypatch.setattr(machine, "CPU_COPY_BYTES", 1 << 16)


def test_forward_writes_figures_for_every_case(small_machine, tmp_path):
    arguments = ["--device", "cpu", "--shapes", "1,64,2,16", "2,65,4,8,2", "--masks", "full", "causal", "window=7,3"]
    arguments += ["--contenders", "cuflash", "--repeats", "2", "--output", str(tmp_path)]
    assert forward.main(arguments) == 0
    report = json.loads((tmp_path / "forward.json").read_text())
    assert len(report["results"]) == 6
    assert {"python", "cpu", "numpy"} <= set(report["machine"])
    for row in report["results"]:
        assert row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["tflops"] > 0
        assert row["share_of_matmul"] > 0
        assert row["share_of_copy"] > 0
        assert 0 <= row["error"] <= cases.ERROR_LIMITS["float32"]
    assert (tmp_path / "forward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("contender", contenders.find("cpu"), ids=lambda c: c.name)
def test_every_contender_answers_the_same_question(contender):
    rows, runs = driver.checked(PASSES["forward"], CASE, [contender])
    assert list(runs) == [contender.name], rows


@pytest.mark.parametrize("flags", [[], ["--with-forward"]], ids=["alone", "with forward"])
def test_backward_writes_figures_for_every_case(small_machine, tmp_path, flags):
    arguments = ["--device", "cpu", "--shapes", "1,64,2,16", "2,65,4,8,2", "--masks", "causal", "window=7,3"]
    arguments += ["--contenders", "cuflash", "--repeats", "2", "--output", str(tmp_path), *flags]
    assert backward.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.stem == ("forward_backward" if flags else "backward")
    report = json.loads(path.read_text())
    assert len(report["results"]) == 4
    for row in report["results"]:
        assert row["tflops"] > 0
        assert 0 <= row["error"] <= 4 * cases.ERROR_LIMITS["float32"]
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("with_forward", [False, True])
@pytest.mark.parametrize("name", [c.name for c in contenders.find_backward("cpu", False)])
def test_every_contender_has_the_same_gradients(name, with_forward):
    (contender,) = (c for c in contenders.find_backward("cpu", with_forward) if c.name == name)
    rows, runs = driver.checked(PASSES["backward"], CASE, [contender])
    assert list(runs) == [name], rows


@pytest.mark.parametrize("which", range(3), ids=["dq", "dk", "dv"])
def test_a_wrong_gradient_is_not_timed(which):
    def prepare(case, inputs):
        run = contenders.find_backward("cpu", False)[0].prepare(case, inputs)
        factors = [1.01 if i == which else 1 for i in range(3)]
        return contenders.Run(run.call, run.wait, lambda g: tuple(x * f for x, f in zip(g, factors, strict=True)))

    rows, runs = driver.checked(PASSES["backward"], CASE, [contenders.Contender("off", "0", prepare)])
    assert runs == {}
    assert rows[0]["failure"].startswith("wrong: error")


@pytest.mark.parametrize("what", PASSES.values(), ids=lambda what: what.name)
@pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.mask)
def test_every_contender_answers_the_same_sparse_question(case, what):
    found = sparse.contenders(what, case, "cpu")
    rows, runs = driver.checked(what, case, found)
    assert list(runs) == [contender.name for contender in found], rows


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", MASKED_CASES, ids=lambda case: case.mask)
def test_flex_attention_answers_the_same_question(case):
    rows, runs = driver.checked(PASSES["forward"], case, [flex.contender("cpu", "forward", compiled=False)])
    assert list(runs) == ["torch flex"], rows


@pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.mask)
def test_density_of_sparse_cases(case):
    shares = [case.visible(head=head).mean() for head in range(case.num_heads)]
    assert np.mean(shares) == pytest.approx(case.density, abs=0.01)  # that of random tokens is an expectation


def test_lists_are_made_anew():
    case = sparse_cases.MaskedCase(1, 128, 1, 1, 16, "float16", pattern="random", amount=1)
    ours, anew = sparse.contenders(PASSES["forward"], case, "cpu")[:2]
    with cuflash.emulate("sm_80") as device:
        for contender, launches in ((ours, [2, 1, 1]), (anew, [2, 2, 2])):
            run = contender.prepare(case, case.inputs())
            before = len(device.launches)
            counts = []
            for _ in range(3):
                run.call()
                counts.append(len(device.launches) - before - sum(counts))
            assert counts == launches


def test_another_mask_is_not_timed():
    def prepare(case, inputs):
        other = sparse_cases.MaskedCase(*SPARSE_SHAPE, pattern="window", amount=36)
        return contenders.find("cpu")[0].prepare(other, inputs)

    rows, runs = driver.checked(PASSES["forward"], MASKED_CASES[1], [contenders.Contender("off", "0", prepare)])
    assert runs == {}
    assert rows[0]["failure"].startswith("wrong: error")


def test_sparse_writes_figures_for_every_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "PAUSE", 0)
    arguments = ["--device", "cpu", "--shapes", "1,512,2,8", "--contenders", "cuflash", sparse.LISTS]
    assert sparse.main([*arguments, "--repeats", "1", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "sparse.json").read_text())["results"]
    assert {row["setting"] for row in results} == set(sparse.SETTINGS)
    for row in results:
        assert row["seconds"]["least"] > 0
        assert row["of_dense"] > 0
        assert (row["contender"] == sparse.DENSE) == (row["of_dense"] == 1)
        assert ("lists" in row) == (row["contender"] == sparse.LISTS)
    assert len({row["case"] for row in results if row["setting"] == "scfa"}) == 13
    assert (tmp_path / "sparse.png").read_bytes().startswith(b"\x89PNG")
    assert "density: B1 S512 H2 D8 float32, backward" in capsys.readouterr().out


def test_a_wrong_answer_is_not_timed():
    def prepare(case, inputs):
        return contenders.Run(lambda: inputs[0] * 0, lambda out: None, np.asarray)

    rows, runs = driver.checked(PASSES["forward"], CASE, [contenders.Contender("zeros", "0", prepare)])
    assert runs == {}
    assert rows[0]["failure"].startswith("wrong: error")


def test_a_refusal_stands_in_the_results(small_machine, tmp_path, monkeypatch):
    def prepare(case, inputs):
        raise RuntimeError("head_dim is not for me")

    refusing = contenders.Contender("cuflash", "0", prepare)
    monkeypatch.setattr(contenders, "find", lambda device: [refusing])
    arguments = ["--device", "cpu", "--shapes", "1,8,1,8", "--masks", "full", "--output", str(tmp_path)]
    assert forward.main(arguments) == 1
    assert "head_dim is not for me" in json.loads((tmp_path / "forward.json").read_text())["results"][0]["failure"]


def test_samples_are_interleaved():
    order = []
    runs = {name: contenders.Run(lambda n=name: n, lambda out: None, np.asarray) for name in "abc"}
    times = measure.interleaved(runs, lambda run: float(len(order)) + bool(order.append(run.call())), repeats=3)
    assert "".join(order) == "abcbcacab"
    assert times["a"].count == 3


def test_peak_memory_of_a_fresh_process(capsys):
    if not sys.platform.startswith("linux"):
        pytest.fail("the high-water mark is read from Linux's /proc")
    assert memory.main(["--shape", "1,256,1,16", "--contenders", "cuflash", "--threads", "1"]) == 0
    assert "cuflash" in capsys.readouterr().out


def test_the_first_call_of_a_process(capsys, tmp_path):
    assert first_call.main(["--device", "sm_80", "--repeats", "1", "--output", str(tmp_path)]) == 0
    seconds = json.loads((tmp_path / "first_call.json").read_text())["seconds"]
    assert 0 < seconds["from_disk"][0] < seconds["cold"][0]
    assert "cold: " in capsys.readouterr().out


def test_inputs_are_not_zeros():
    for array in CASE.inputs():
        assert abs(float(array.std()) - 1) < 0.1


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5,6", "a,2,3,4", "0,2,3,4", "1,8,4,16,3"])
def test_bad_shape(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        cases.parse_shape(text)


@pytest.mark.parametrize("text", ["half", "window", "window=3", "window=-1,2", "causal=1"])
def test_bad_mask(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be full, causal or window=left,right"):
        cases.parse_mask(text)


def test_tables_show_every_result():
    rows = [{"case": "c", "contender": "peer", "failure": "no"}]
    console = Console(record=True, width=100)
    console.print(*report.tables(rows))
    assert "peer: no" in console.export_text()


def test_a_gpu_session_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    commands = {
        "missing": ["no-such-program"],
        "failing": [sys.executable, "-c", "print('why'); raise SystemExit(3)"],
        "slow": [sys.executable, "-c", "import time; time.sleep(60)"],
        "good": [sys.executable, "-c", "print('fine')"],
    }
    monkeypatch.setattr(gpu_session, "steps", lambda folder: commands)
    assert gpu_session.main([str(tmp_path), "--limit", "2"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary[name]["outcome"] for name in commands] == [
        "not run: no-such-program is not installed",
        "failed with exit code 3",
        "stopped after 2 s",
        "passed",
    ]
    assert (tmp_path / "failing.log").read_text() == "why\n"
    assert "good: passed" in capsys.readouterr().out


def test_a_gpu_session_names_files_that_exist():
    for name, command in gpu_session.steps(Path("out")).items():
        for part in command:
            assert not part.startswith("tests/") or Path(part).exists(), name


DECODE_CASES = [
    decode_cases.DecodeCase(3, 70, 2, 4, 16, head_dim=32, dtype="float32"),
    decode_cases.DecodeCase(2, 50, 1, 3, 1, head_dim=32, dtype="bfloat16"),
    decode_cases.DecodeCase(2, 33, 2, 1, 0, head_dim=16, dtype="float16"),
]


def test_decode_writes_figures_for_every_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(decode.READ_BYTES, "cpu", 1 << 20)
    arguments = ["--device", "cpu", "--head-dim", "32", "--contenders", "cuflash", "--repeats", "2"]
    assert decode.main([*arguments, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "decode.json").read_text())
    assert len(report["results"]) == len(decode.CPU_CASES)
    assert report["read_bytes_per_second"] > 0
    for row in report["results"]:
        assert row["seconds"]["least"] > 0
        assert row["copies"] > 1
        assert row["share_of_read"] > 0
        assert 0 <= row["error"] <= cases.ERROR_LIMITS["float32"]
    assert "blocks of" in capsys.readouterr().out  # a table, whose cells may break where they will


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("decoder", decode_cases.find("cpu"), ids=lambda decoder: decoder.name)
def test_every_decoder_answers_the_same_question(case, decoder):
    (row,) = decode.measure(case, [decoder], "cpu", 1, 1.0)
    assert "failure" not in row


def test_host_time_is_of_a_short_queue(monkeypatch):
    """A call that finds the queue full takes as long as the GPU; what waits is not timed."""
    clock, queued, most = 0.0, 0, 0

    def call():
        nonlocal clock, queued, most
        queued += 1
        most = max(most, queued)
        clock += 1.0

    def synchronize():
        nonlocal clock, queued
        queued, clock = 0, clock + 1000.0

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(synchronize=synchronize)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: clock))
    assert decode.host_seconds(call) == 1.0
    assert most == decode.HOST_CALLS_QUEUED


def test_a_wrong_decoder_is_not_timed():
    zeros = decode_cases.Decoder("zeros", "0", lambda case, given: lambda: given.q * 0)
    (row,) = decode.measure(DECODE_CASES[0], [zeros], "cpu", 1, 1.0)
    assert row["failure"].startswith("wrong: error")
    assert "seconds" not in row


def test_skewed_lengths_have_the_same_total():
    for batch, length in ((1, 7), (32, 4096), (64, 1000)):
        case = decode_cases.DecodeCase(batch, length, 8, 4, 16)
        skewed = decode_cases.DecodeCase(batch, length, 8, 4, 16, skewed=True)
        assert skewed.lengths.sum() == batch * length
        assert skewed.lengths.min() >= 1
        assert skewed.bytes == case.bytes


def test_settings_of_decoding_are_cases():
    for texts in decode.SETTINGS.values():
        for text in texts:
            assert decode_cases.parse_case(text).batch >= 1


@pytest.mark.parametrize("text", ["1,2,3,4", "1,2,3,4,5,even", "0,1,1,1,16", "1,1,1,1,-1", "1,2,3,4,5,6,skewed"])
def test_bad_decode_case(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        decode_cases.parse_case(text)
