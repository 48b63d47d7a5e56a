"""The command line. A command is a module with `add_parser(subparsers)`, which sets its `run` as the default."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cuflash.cli import compile, explain, info
from cuflash.errors import CuflashError

COMMANDS = (info, compile, explain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after a message for what the caller got wrong."""
    parser = argparse.ArgumentParser(prog="python -m cuflash", description="Exact, IO-aware attention for arrays.")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    status = 0
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
    except CuflashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has what it wants; at exit Python would flush what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
