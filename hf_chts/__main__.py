"""`python -m hf_chts COMMAND …`: what is done with exports outside of training."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_chts.export.convert import SHARD_SIZE, pack_directory, unpack_directory


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in --help, its arguments, and what it does with them."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _conversion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="DIR", help="directory to read")
    parser.add_argument("target", metavar="OUT", help="directory to write: a new or an empty one")
    parser.add_argument(
        "--max_shard_size",
        default=SHARD_SIZE,
        metavar="SIZE",
        help=f"size of a weights file at most, such as 5GB (default: {SHARD_SIZE}, as in save_pretrained)",
    )


def _pack(args: argparse.Namespace) -> None:
    print(f"packed  {pack_directory(args.source, args.target, max_shard_size=args.max_shard_size)}")


def _unpack(args: argparse.Namespace) -> None:
    print(f"plain  {unpack_directory(args.source, args.target, max_shard_size=args.max_shard_size)}")


COMMANDS = {
    "pack": Command("store sparse weights as bits and the values of their links", _conversion_arguments, _pack),
    "unpack": Command("make a plain directory of a packed one, bit for bit", _conversion_arguments, _unpack),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: with argparse's message, or with that of what went wrong.
    """
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
