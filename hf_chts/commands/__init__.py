"""The subcommands of `python -m hf_chts`, a file each."""
