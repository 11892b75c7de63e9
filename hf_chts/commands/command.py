"""What a subcommand consists of."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in --help, its arguments, and what it does with them.

    `run` raises ValueError or OSError for whatever the user can mend; its message is what they read.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
