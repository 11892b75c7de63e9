"""`report`."""

import argparse

from hf_chts.commands.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="output_dir of a run; several are compared")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="HTML file to write, with its figures in a directory beside it (default: RUN_DIR/report.html; "
        "report.html in the current directory for several runs)",
    )
    parser.add_argument(
        "--layers",
        metavar="PATTERN",
        default="*",
        help="layers to show by themselves, such as '*.down_proj' (default: %(default)s, all)",
    )


def _run(args: argparse.Namespace) -> None:
    from hf_chts.report import write_report  # here, for matplotlib takes its time, and other commands need not wait

    print(f"report  {write_report(args.runs, args.output, args.layers)}")


REPORT = Command("write what is known of runs into one HTML file", _arguments, _run)
