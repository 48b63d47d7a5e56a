"""`python -m benchmarks.forward`: speed of attention forward, cuflash beside every peer that can be imported.

Each contender is checked against float64 on a sample of rows before it is timed; samples are interleaved; rates of a
matrix product and of a copy come from the same run.
"""

from __future__ import annotations

from benchmarks import driver


def main(arguments: list[str] | None = None) -> int:
    return driver.main(driver.parser("forward", __doc__ or "").parse_args(arguments), "forward")


if __name__ == "__main__":
    raise SystemExit(main())
