"""`python -m hf_chts COMMAND …`: what is done before and after training."""

import argparse
import sys
from collections.abc import Sequence

from hf_chts.commands.convert import PACK, UNPACK
from hf_chts.commands.prepare import PREPARE
from hf_chts.commands.push import PUSH
from hf_chts.commands.report import REPORT
from hf_chts.plain_text import print_anything

COMMANDS = {
    "pack": PACK,
    "unpack": UNPACK,
    "prepare": PREPARE,
    "push": PUSH,
    "report": REPORT,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: with argparse's message, or with that of what went wrong.
    """
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m hf_chts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"hf_chts {args.command}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
