"""`python -m hf_chts`: the same as `hf-chts`, which launchers cannot start."""

from hf_chts.commands import end_rank
from hf_chts.commands.app import main

if __name__ == "__main__":
    main()
    end_rank()
