"""Metadata of a GGUF, of which nothing may be left unread: an unknown field may change what the model computes."""

from __future__ import annotations

import math
from typing import Any

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.header import Fields

ADVICE = "use the checkpoint folder that it was made from"


class Keys:
    """The fields under one prefix. Each is read by its name, checked for its type; those never read are `left`."""

    def __init__(self, fields: Fields, prefix: str, file: str) -> None:
        self.prefix, self.file = prefix, file
        self._fields = {name: field[0] for name, field in fields.items() if name.startswith(prefix)}
        self._read: set[str] = set()

    def refuse(self, name: str, expected: str) -> UserError:
        found = repr(self._fields.get(self.prefix + name))
        return UserError(f"expected {expected} as {self.prefix}{name} of {self.file!r}, got {found[:80]}.")

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value as it is, or `default` if it is not there."""
        self._read.add(self.prefix + name)
        return self._fields.get(self.prefix + name, default)

    def has(self, name: str) -> bool:
        return self.prefix + name in self._fields

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number. A list of equal numbers, one for each layer, is taken as that number."""
        value = self.get(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refuse(name, "one number for all layers")
            value = value[0]
        if value is None:
            raise UserError(f"expected the field {self.prefix}{name} in {self.file!r}, which lacks it.")
        if type(value) is not int or not least <= value < 2**31:
            raise self.refuse(name, f"a whole number of at least {least}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.get(name, default)
        if value is None:
            raise UserError(f"expected the field {self.prefix}{name} in {self.file!r}, which lacks it.")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(name, "a positive number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, "a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def only(self, name: str, *values: Any) -> None:
        """Raise UserError if a field is there and has another value than those that change nothing."""
        if self.has(name) and self.get(name) not in values:
            raise self.refuse(name, f"nothing but {' or '.join(map(repr, values))}, which changes no result,")

    @property
    def left(self) -> list[str]:
        """Names of the fields that were not read."""
        return sorted(self._fields.keys() - self._read)
