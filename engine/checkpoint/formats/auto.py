"""Selects the format that suits the model."""

from __future__ import annotations

from pathlib import Path

from blockpruner.engine.checkpoint.format import Format, Pruned
from blockpruner.engine.checkpoint.formats.deci import Deci
from blockpruner.engine.checkpoint.formats.grouped import Grouped
from blockpruner.engine.errors import UserError


class Auto(Format):
    name = "auto"
    about = "deci if it fits the model, else grouped"
    loading = ()
    runtimes = ()

    def fitting(self, pruned: Pruned) -> Format:
        from blockpruner.engine.checkpoint.deci import why_not_deci
        from blockpruner.engine.checkpoint.remainder import what_is_left

        try:
            return Deci() if why_not_deci(what_is_left(pruned.model)) is None else Grouped()
        except UserError:  # only the grouped format can express the model
            return Grouped()

    def write(self, pruned: Pruned, folder: Path) -> list[str]:
        return self.fitting(pruned).write(pruned, folder)
