"""Sorts the links of a layer for its products, in time in proportion to the links."""

# numba types these functions itself
# mypy: disallow-untyped-defs=False
import numpy as np
from numba import njit


def _njit(function):
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder can be written to
        return njit(nogil=True, error_model="numpy")(function)


@_njit
def order_links(positions, rows, columns, blocks, by_row, by_column):
    """Sort links by (block of columns, row, column), and by (block of rows, column, row).

    Args:
        positions: integers (slots,): row · columns + column for each slot; rows · columns without a link.
        rows, columns: of the layer; all of its links fit into what follows.
        blocks: (the number of rows, the number of columns) of a block.
        by_row: (columns, slots, starts): the column of each link as uint16 or int32 (slots,), its slot, int32 (slots,),
            and the first link of each row in each block, int64 (blocks · rows + 1,).
        by_column: the same of the transposed layer.
    """
    link_columns, link_slots, row_starts = by_row
    link_rows, link_slots_t, column_starts = by_column
    numel = rows * columns
    row_block, column_block = blocks
    # by column, in the order of the slots; then stable by row and block, then stable by column and block of rows
    next_place = np.zeros(columns + 1, np.int64)
    for position in positions:
        if position < numel:
            next_place[position % columns + 1] += 1
    for column in range(columns):
        next_place[column + 1] += next_place[column]
    links = next_place[columns]
    sorted_slots = np.empty(links, np.int32)
    for slot in range(len(positions)):
        position = np.int64(positions[slot])
        if position < numel:
            column = position % columns
            sorted_slots[next_place[column]] = slot
            next_place[column] += 1
    row_starts[:] = 0
    for slot in sorted_slots:
        position = np.int64(positions[slot])
        row_starts[(position % columns) // column_block * rows + position // columns + 1] += 1
    for place in range(len(row_starts) - 1):
        row_starts[place + 1] += row_starts[place]
    place_of = row_starts[:-1].copy()
    for slot in sorted_slots:
        position = np.int64(positions[slot])
        row, column = position // columns, position % columns
        place = column // column_block * rows + row
        link_columns[place_of[place]] = column
        link_slots[place_of[place]] = slot
        place_of[place] += 1
    column_starts[:] = 0
    for link in range(links):
        position = np.int64(positions[link_slots[link]])
        column_starts[(position // columns) // row_block * columns + position % columns + 1] += 1
    for place in range(len(column_starts) - 1):
        column_starts[place + 1] += column_starts[place]
    place_of = column_starts[:-1].copy()
    for link in range(links):
        slot = link_slots[link]
        position = np.int64(positions[slot])
        row, column = position // columns, position % columns
        place = row // row_block * columns + column
        link_rows[place_of[place]] = row
        link_slots_t[place_of[place]] = slot
        place_of[place] += 1
