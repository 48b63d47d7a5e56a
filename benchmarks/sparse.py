"""`python -m benchmarks.sparse`: sparse attention beside dense attention, and beside peers that take masks.

Settings: "block-sparse" is that of FlashAttention 1 (forward and backward, blocks of density min(1/8, 256/N)), "scfa"
that of SCFA (forward and backward, hashes and dropped tokens, sorting included), "density" sweeps random blocks,
windows and butterflies, forward and backward apart. Times at density s stand beside (1.1 s + 0.03) times that of dense
attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks import driver

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.cases import Case
    from benchmarks.contenders import Contender, Run
    from benchmarks.measure import Timer
    from benchmarks.passes import Pass

Shape = tuple[int, int, int, int, int]  # batch, seqlen, num_heads, num_kv_heads, head_dim
DENSE, LISTS = "dense", "cuflash, lists anew"
LONGEST_ARRAY = 32768  # tokens up to which a peer is given the mask as an array
SHARES = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]

# What the papers report, as many times as fast as FlashAttention, on an A100: by length, buckets, percent dropped.
FLASH_ATTENTION_1 = {4096: 30 / 3.2, 8192: 119 / 6.6, 16384: 471 / 12.6, 32768: 1876 / 24.9, 65536: 7493 / 50.4}
SCFA_HASH = {n: 1005 / ms for n, ms in {2: 1075, 4: 690, 8: 480, 16: 375, 32: 320, 64: 290}.items()}
SCFA_QK = {n: 1005 / ms for n, ms in {20: 970, 30: 755, 40: 565, 50: 405, 60: 268, 70: 163, 80: 85}.items()}


@dataclass(frozen=True)
class Setting:
    """`cases(shape, dtype)` gives the dense case and the sparse ones; `paper` a paper's speedup of one of these."""

    passes: tuple[str, ...]
    gpu_dtype: str
    gpu_shapes: list[str]
    cpu_shapes: list[str]
    cases: Callable[[Shape, str], tuple[Case, list[Case]]]
    paper: Callable[[Any], float | None]


def main(arguments: list[str] | None = None) -> int:
    parse = driver.parser("sparse", __doc__ or "", masks=False)
    parse.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="all by default")
    parse.add_argument("--cases", nargs="+", help="cases whose names begin like one of these, such as 'hash, 16'")
    args = parse.parse_args(arguments)
    driver.set_threads(args.threads)
    from rich.console import Console

    from benchmarks import sparse_report

    console = Console()
    report = run(args, console)
    sparse_report.plot(report["results"], args.output / "sparse.png")
    console.print(f"wrote {args.output / 'sparse.json'} and {args.output / 'sparse.png'}")
    return 1 if any("failure" in row and row["contender"] in ("cuflash", DENSE) for row in report["results"]) else 0


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every setting, shape, pass and case that `args` asks for: a table when one shape is done, and the JSON file
    with what there is by then.
    """
    from rich.progress import Progress

    from benchmarks import machine, sparse_report
    from benchmarks.cases import parse_shape
    from benchmarks.measure import cuda_timer, host_timer
    from benchmarks.passes import PASSES

    device = driver.device_of(args.device)
    cuda = device == "cuda"
    timer = cuda_timer() if cuda else host_timer
    report: dict[str, Any] = {"device": device, "machine": machine.describe(device, args.threads), "results": []}
    jobs = []
    for name in args.settings or SETTINGS:
        setting = SETTINGS[name]
        for shape in map(parse_shape, args.shapes or (setting.gpu_shapes if cuda else setting.cpu_shapes)):
            for dtype in args.dtype or [setting.gpu_dtype if cuda else "float32"]:
                dense, cases = setting.cases(shape, dtype)
                cases = [case for case in cases if args.cases is None or case.mask.startswith(tuple(args.cases))]
                jobs += [(name, PASSES[what], dense, cases) for what in setting.passes]
    with Progress(console=console) as progress:
        task = progress.add_task("sparse attention", total=sum(len(cases) for *_, cases in jobs))
        for name, what, dense, cases in jobs:
            measurement = Measurement(name, what, dense, device, timer, args.repeats or (10 if cuda else 5))
            rows = []
            for case in cases:
                rows += measurement.rows(case, args.contenders)
                progress.advance(task)
            report["results"] += rows
            console.print(*sparse_report.tables(rows), sep="\n")
            sparse_report.write(report, args.output)
    return report


class Measurement:
    """One pass over one shape: dense attention is checked once, and takes part in the rounds of every sparse case."""

    def __init__(self, setting: str, what: Pass, dense: Case, device: str, timer: Timer, repeats: int) -> None:
        self.setting, self.what, self.dense, self.device = setting, what, dense, device
        self.timer, self.repeats = timer, repeats
        contender = replace(what.find(device)[0], name=DENSE)
        (self.dense_row,), self.dense_run = driver.checked(what, dense, [contender])

    def rows(self, case: Case, wanted: list[str] | None) -> list[dict[str, Any]]:
        """A row for each contender that is wanted, after that of dense attention."""
        from benchmarks.measure import interleaved

        found = [c for c in contenders(self.what, case, self.device) if wanted is None or c.name in wanted]
        rows, runs = driver.checked(self.what, case, found)
        measured = interleaved(self.dense_run | runs, self.timer, self.repeats)
        times = {name: time.to_json() for name, time in measured.items()}
        result = []
        for row, of in ((self.dense_row, self.dense), *((row, case) for row in rows)):
            row = row | {"setting": self.setting, "pass": self.what.name, "shape": case.shape, "case": case.mask}
            row |= {"seqlen": case.seqlen, "density": of.density}
            if row["contender"] in times:
                row |= self._figures(row["contender"], of.density, times)
            if row["contender"] == "cuflash":
                row["paper"] = SETTINGS[self.setting].paper(case)
            result.append(row)
        return result

    def _figures(self, name: str, density: float, times: dict[str, dict[str, float]]) -> dict[str, Any]:
        """TFLOP/s of visible pairs, time as a share of dense attention's, that of lists as a share of the rest."""
        seconds = times[name]["median"]
        every_pair = replace(self.dense.problem, left=None, right=None)
        figures: dict[str, Any] = {"seconds": times[name]}
        figures["tflops"] = 1e-12 * self.what.flops(every_pair) * density / seconds
        if DENSE in times:
            figures["of_dense"] = seconds / times[DENSE]["median"]
            figures["bar"] = 1.1 * density / self.dense.density + 0.03
        if name == LISTS and "cuflash" in times:
            figures["lists"] = seconds / times["cuflash"]["median"] - 1
        return figures


def contenders(what: Pass, case: Case, device: str) -> list[Contender]:
    """cuflash first; for masks also with lists that every call makes anew, and peers that take masks."""
    from benchmarks import flex
    from benchmarks.contenders import Contender
    from benchmarks.sparse_cases import MaskedCase

    ours, *others = what.find(device)
    if not isinstance(case, MaskedCase):
        return [ours]
    found = [ours]
    if what.name == "forward":
        found.append(Contender(LISTS, ours.version, lambda case, inputs: _with_lists(ours.prepare(case, inputs), case)))
    with_mask = "torch efficient" if device == "cuda" else "torch flash"
    if case.seqlen <= LONGEST_ARRAY:
        found += [replace(other, name="torch mask") for other in others if other.name == with_mask]
    return found + flex.find(device, what.name)


def _with_lists(run: Run, case: Any) -> Run:
    """The run, with the lists of tiles forgotten before each call."""
    kept = case.built.program.kept

    def call() -> Any:
        for key in ("cpu", "lists"):
            kept.pop(key, None)
        return run.call()

    return replace(run, call=call)


def _density(shape: Shape, dtype: str) -> tuple[Case, list[Case]]:
    from benchmarks.cases import Case
    from benchmarks.sparse_cases import BLOCK, MaskedCase

    length = shape[1]
    amounts = {
        "random": [max(1, round(share * length / BLOCK)) for share in SHARES],
        "window": [max(1, round(share * length / 2)) for share in SHARES],
        "butterfly": [64, 128, 256],
    }
    cases = [MaskedCase(*shape, dtype, pattern=p, amount=n) for p in amounts for n in dict.fromkeys(amounts[p])]
    return Case(*shape, dtype), list(cases)


def _block_sparse(shape: Shape, dtype: str) -> tuple[Case, list[Case]]:
    from benchmarks.cases import Case
    from benchmarks.sparse_cases import BLOCK, MaskedCase

    blocks = max(1, round(min(1 / 8, 256 / shape[1]) * shape[1] / BLOCK))
    patterns = (("random", blocks), ("butterfly", BLOCK))
    return Case(*shape, dtype), [MaskedCase(*shape, dtype, pattern=p, amount=n) for p, n in patterns]


def _scfa(shape: Shape, dtype: str) -> tuple[Case, list[Case]]:
    from benchmarks.cases import Case
    from benchmarks.sparse_cases import HashCase, KeptCase

    hashes = [HashCase(*shape, dtype, buckets=n) for n in SCFA_HASH]
    kept = [KeptCase(*shape, dtype, dropped=n) for n in SCFA_QK]
    return Case(*shape, dtype, None, 0), [*hashes, *kept]


def _paper_of_blocks(case: Any) -> float | None:
    return FLASH_ATTENTION_1.get(case.seqlen) if case.pattern == "random" else None


def _paper_of_scfa(case: Any) -> float | None:
    return SCFA_HASH[case.buckets] if hasattr(case, "buckets") else SCFA_QK[case.dropped]


SETTINGS = {
    "block-sparse": Setting(
        ("forward_backward",),
        "float16",
        [f"16,{length},8,64" for length in FLASH_ATTENTION_1],
        ["1,1024,2,64", "1,2048,2,64"],
        _block_sparse,
        _paper_of_blocks,
    ),
    "scfa": Setting(("forward_backward",), "bfloat16", ["4,32768,48,64"], ["1,2048,2,64"], _scfa, _paper_of_scfa),
    "density": Setting(
        ("forward", "backward"),
        "bfloat16",
        ["1,16384,32,64", "1,16384,16,128", "1,32768,32,64", "1,32768,16,128"],
        ["1,2048,2,64"],
        _density,
        lambda case: None,
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
