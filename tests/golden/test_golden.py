"""Single instructions on the emulator, against their models and every recording of a real GPU in this folder."""

from pathlib import Path

import numpy as np
import pytest

from cuflash.emulator import Device
from cuflash.errors import CompileError
from cuflash.jit import compile_cubin, compile_ptx
from tests.golden.program import LANES, Expected, digest
from tests.golden.programs import PROGRAMS

RECORDED = [
    (path, program)
    for path in sorted(Path(__file__).parent.glob("*.npz"))
    for program in PROGRAMS
    if program.capability <= int(path.stem.removeprefix("sm_"))
]


def emulate(program, inputs, arch=None):
    device = Device(arch or program.arch)
    source = device.to_device(inputs, name="in")
    target = device.empty((len(inputs), program.outputs), np.uint32, name="out")
    kernel = device.load(compile_ptx(program, arch or program.arch)).kernel(program.entry)
    kernel.launch((len(inputs) // LANES, 1, 1), (LANES, 1, 1), [source, target])
    return target.to_host()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_the_emulator_keeps_to_the_instruction_set(program):
    inputs = program.inputs()
    program.model(inputs).check(emulate(program, inputs))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_the_assembler_has_the_instruction_from_its_capability_on(program):
    assert compile_cubin(program, program.arch).exists()
    if program.capability > 80:
        with pytest.raises(CompileError):
            compile_cubin(program, {89: "sm_86", 90: "sm_89"}[program.capability])


@pytest.mark.parametrize(("path", "program"), RECORDED, ids=lambda x: getattr(x, "stem", None) or x.name)
def test_every_recording_of_a_gpu_agrees_with_model_and_emulator(path, program):
    inputs = program.inputs()
    with np.load(path) as recording:
        assert recording[f"{program.name}.inputs"] == digest(inputs), "recorded of other inputs: record anew"
        recorded = recording[program.name]
    expected, emulated = program.model(inputs), emulate(program, inputs, path.stem)
    if expected.words is not None:
        assert recorded == digest(expected.words) == digest(emulated)
        return
    expected.check(recorded)
    if program.same_bits:
        np.testing.assert_array_equal(emulated, recorded)
    else:
        there = expected.numbers(recorded)
        Expected(value=there, error=expected.error, dtype=expected.dtype).check(emulated, slack=2.0)


def test_a_wrong_output_is_noticed():
    """The models can fail: one changed bit of an exact output, three tolerances of an approximate one."""
    for program in PROGRAMS:
        expected = program.model(program.inputs())
        if expected.words is not None:
            out = expected.words.copy()
            out[3, 0] ^= 1
        else:
            finite = np.argmax(np.isfinite(expected.value) & (expected.error > 0))
            shifted = expected.value.copy()
            shifted.flat[finite] += 3 * expected.error.flat[finite]
            out = shifted.astype(expected.dtype).view(np.uint32)
        with pytest.raises(AssertionError):
            expected.check(out)
