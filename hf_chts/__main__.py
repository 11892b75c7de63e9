"""`hf-chts` and `python -m hf_chts`, which launchers may start as ranks."""

from hf_chts.commands import end_rank
from hf_chts.commands.app import main


def program() -> None:
    """Run the command of this process's arguments."""
    main()
    end_rank()


if __name__ == "__main__":
    program()
