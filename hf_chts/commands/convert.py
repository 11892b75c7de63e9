"""`pack` and `unpack`."""

import argparse

from hf_chts.commands.command import Command
from hf_chts.export.convert import SHARD_SIZE, pack_directory, unpack_directory


def _arguments(parser: argparse.ArgumentParser) -> None:
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


PACK = Command("store sparse weights as bits and the values of their links", _arguments, _pack)
UNPACK = Command("make a plain directory of a packed one, bit for bit", _arguments, _unpack)
