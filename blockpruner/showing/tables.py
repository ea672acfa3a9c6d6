"""Tables of numbers on the console."""

from __future__ import annotations

from rich.table import Table


def numbers_table(*columns: str, title: str | None = None) -> Table:
    """Create a table whose first column is text and whose other columns are numbers."""
    table = Table(*columns, title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"  # fold, since a truncated number would be wrong
    return table
