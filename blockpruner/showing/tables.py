"""Tables of numbers on the console."""

from __future__ import annotations

from rich.table import Table


def numbers_table(*columns: str, title: str | None = None) -> Table:
    """Create a table whose first column is text and whose other columns are numbers. On a narrow console the widest
    column, nearly always the text, is wrapped first."""
    table = Table(*columns, title=title)
    for column in table.columns:
        column.overflow = "fold"  # a truncated number would be wrong
    for column in table.columns[1:]:
        column.justify = "right"
    return table
