"""`python -m benchmarks.backward`: speed of the gradients of attention, cuflash beside every peer that can be imported.

Timed is the pullback alone, from a cotangent to the gradients of q, k and v; with --with-forward the forward as well.
The gradients of every contender are checked against float64 on a sample before they are timed.
"""

from __future__ import annotations

from benchmarks import driver


def main(arguments: list[str] | None = None) -> int:
    parse = driver.parser("backward", __doc__ or "")
    parse.add_argument("--with-forward", action="store_true", help="time forward and backward together")
    args = parse.parse_args(arguments)
    return driver.main(args, "forward_backward" if args.with_forward else "backward")


if __name__ == "__main__":
    raise SystemExit(main())
