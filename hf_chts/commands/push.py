"""`push`."""

import argparse

from hf_chts.commands.command import Command
from hf_chts.export.hub import push_directory


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="an export, plain or packed, or a checkpoint; not changed")
    parser.add_argument("repo_id", metavar="REPO", help="NAMESPACE/NAME on the Hub; made where there is none")
    parser.add_argument(
        "--private", action="store_true", help="make the repository private, if it is made here (default: public)"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    parser.add_argument(
        "--commit_message", metavar="TEXT", help="of the commit (default: Upload sparse model with hf_chts)"
    )
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="what eval_zero_shot.py --output wrote, for the zero-shot table of the model card (default: "
        "DIR/zero_shot.json, where it is)",
    )
    parser.add_argument(
        "--figures",
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures for the model card, such as training.png (default: those in DIR/figures)",
    )


def _push(args: argparse.Namespace) -> None:
    commit = push_directory(
        args.directory,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
        results=args.results,
        figures=args.figures,
    )
    print(f"pushed  {commit.repo_url}\ncommit  {commit.commit_url}")


PUSH = Command("push an export to the Hub; the token is that of `hf auth login` or of HF_TOKEN", _arguments, _push)
