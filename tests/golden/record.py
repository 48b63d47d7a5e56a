"""`python -m tests.golden.record FOLDER`: outputs of single instructions from the GPU at hand, as FOLDER/sm_XX.npz.

Moved to tests/golden/, the file becomes test data: test_golden.py holds the emulator to it. By the name of a program it
has the outputs, or their digest where the model says every bit; inputs, which are made anew, as digests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cuflash.jit import compile_cubin
from cuflash.jit.compiler import compiler_version
from tests.golden.program import LANES, Program, digest
from tests.golden.programs import PROGRAMS


def main() -> int:
    parse = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parse.add_argument("folder", type=Path)
    folder: Path = parse.parse_args().folder
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    capability = 10 * properties["major"] + properties["minor"]
    arch = f"sm_{capability}"
    programs = [program for program in PROGRAMS if program.capability <= capability]
    arrays = {"gpu": np.array(properties["name"].decode()), "nvrtc": np.array(compiler_version())}
    for program in programs:
        inputs = program.inputs()
        arrays |= entries(program, inputs, run_on_gpu(program, inputs, arch))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{arch}.npz", **arrays)
    print(f"recorded {len(programs)} programs on {arrays['gpu']}: {folder / f'{arch}.npz'}")
    return 0


def entries(program: Program, inputs: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """What is recorded of a program. Names one whose exact outputs are not the model's: digests do not tell where."""
    words = program.model(inputs).words
    if words is not None and not np.array_equal(words, outputs):
        print(f"{program.name}: {np.count_nonzero(words != outputs)} of {words.size} outputs differ from the model")
    recorded = outputs if words is None else np.array(digest(outputs))
    return {program.name: recorded, f"{program.name}.inputs": np.array(digest(inputs))}


def run_on_gpu(program: Program, inputs: np.ndarray, arch: str) -> np.ndarray:
    """Outputs, uint32 (threads, outputs), of the program on CuPy's current device."""
    import cupy

    kernel = cupy.RawModule(path=str(compile_cubin(program, arch))).get_function(program.entry)
    source = cupy.asarray(inputs)
    target = cupy.zeros((len(inputs), program.outputs), cupy.uint32)
    kernel((len(inputs) // LANES,), (LANES,), (source, target))
    return cupy.asnumpy(target)


if __name__ == "__main__":
    raise SystemExit(main())
