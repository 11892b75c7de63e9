"""Tables for consoles and log files."""

import io
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def text_table(
    rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, *, right: Collection[int] = ()
) -> list[str]:
    """The lines of a table whose columns are aligned by rich, two spaces apart.

    They are plain text of any width: no colours or other control characters, nothing cut or wrapped, and no markup in
    cells, so that they are the same on a terminal, in a pipe and in a file.

    Args:
        rows: a text for each column.
        header: with a rule below it.
        right: the indices of columns that are aligned to the right.
    """
    table = Table(
        box=box.SIMPLE_HEAD, show_header=header is not None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, head in enumerate(header or [""] * len(rows[0])):
        table.add_column(head, justify="right" if index in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    output = io.StringIO()
    Console(
        file=output,
        width=10**6,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,  # it would show the table instead of writing it into `output`
        legacy_windows=False,
        markup=False,
        emoji=False,
        highlight=False,
    ).print(table)
    return [line.rstrip() for line in output.getvalue().splitlines()]
