"""`python -m hf_chts`: the same as `hf-chts`."""

from hf_chts.commands.app import main

if __name__ == "__main__":
    main()
