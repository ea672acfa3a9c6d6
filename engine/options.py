"""Options, which are validated when they are created, and choices, which are sets of options with a name.

A class of options states the type, range, default and meaning of each option once: as a field with a docstring. The
command line, the Python API and the documentation are all derived from it. Messages name an option by its field in
backticks, as in `num_remove`; the command line turns that into `--num-remove`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from blockpruner.engine.errors import UserError

LONGEST_SHOWN = 200
"""Characters of a wrong value that a message shows."""
OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """Base class of all options. Options are immutable values that can be compared, hashed and pickled."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        """Raises UserError, with a one-line message, for an invalid name, type or value.

        A choice may be given by its name. Numbers may be given as text, as the command line has them, but not as
        booleans, which are a mistake in the order of arguments.
        """
        for name, kind in self.choice_fields().items():
            if isinstance(given := values.get(name), str):
                values[name] = kind.named(name, given)
            elif name in values and not isinstance(given, kind):
                raise UserError(f"expected `{name}` to be {listed(kind.all())}, got {_shown(given)}.")
        for name, field in type(self).model_fields.items():
            if field.annotation is not bool and _has_boolean(values.get(name)):
                raise UserError(
                    f"expected `{name}` {_form(type(self), name) or 'to be a number or text'}, got {values[name]}."
                )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(" ".join(_told(type(self), each) for each in error.errors())) from None

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some options changed."""
        return type(self)(**{**dict(self), **changes})

    @classmethod
    def of(cls, **flat: Any) -> Self:
        """Create options from flat values as on the command line: a choice is given by its name, and its options are
        given at the same level."""
        for name, kind in cls.choice_fields().items():
            options = {key: value for key in kind.option_names() if (value := flat.pop(key, None)) is not None}
            chosen = flat.get(name, cls.model_fields[name].default)
            if isinstance(chosen, str):
                flat[name] = kind.named(name, chosen, options)
            elif isinstance(chosen, Choice) and options:
                flat[name] = kind.named(name, chosen.name, {**dict(chosen), **options})
        return cls(**flat)

    def flat(self) -> dict[str, Any]:
        """Return the flat values, the inverse of `of`. Options of choices that were not chosen are None."""
        values: dict[str, Any] = {}
        for name, value in self:
            values[name] = value.name if isinstance(value, Choice) else value
        for name, kind in self.choice_fields().items():
            values |= {key: getattr(getattr(self, name), key, None) for key in kind.option_names()}
        return values

    def given(self) -> dict[str, Any]:
        """Return the flat values that differ from the defaults. They are enough to create these options again."""
        kinds = self.choice_fields()
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        defaults |= {name: defaults[name].name for name in kinds}
        for name in kinds:
            defaults |= {key: field.default for key, field in type(getattr(self, name)).model_fields.items()}
        return {name: value for name, value in self.flat().items() if value != defaults.get(name)}

    def to_json(self) -> dict[str, Any]:
        """Return the flat values as plain JSON, as they are recorded."""
        values: dict[str, Any] = to_jsonable_python(self.flat())
        return values

    def part(self, section: type[OptionsT]) -> OptionsT:
        """Return only the options of one section."""
        return section(**{name: getattr(self, name) for name in section.model_fields})

    @classmethod
    def choice_fields(cls) -> dict[str, type[Choice]]:
        """Return the fields that hold a choice, with the kind of choice."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Choice)}


class Choice(Options):
    """Options with a name: a strategy, a metric, an export format, a compared method.

    A kind of choice is a subclass that sets `package`. Each module in that package defines one choice, or several
    related ones. Nothing else is needed: `all` finds it, and the command line offers it with its options.
    """

    package: ClassVar[str]
    """Package that holds the modules of this kind of choice."""
    name: ClassVar[str]
    about: ClassVar[str]
    """Short description for help and tables."""

    @classmethod
    def all(cls) -> dict[str, type[Self]]:
        """Return all choices of this kind by name, sorted by name."""
        return _found(cls)  # type: ignore[return-value]

    @classmethod
    def named(cls, what: str, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """Return the choice with the given name and options.

        what: field that holds the choice, such as `strategy`. options: options of any choice of this kind; None means
        the default. Raises UserError for an unknown name and for an option that this choice would ignore.
        """
        found = cls.all()
        check_name(found, what, name)
        given = {key: value for key, value in options.items() if value is not None}
        for key, value in given.items():
            if key not in cls.option_names():
                raise UserError(_no_option(key, cls.option_names()))
            owners = [other for other, kind in found.items() if key in kind.model_fields]
            if owners and name not in owners and value != found[owners[0]].model_fields[key].default:
                needed = listed(f"`{what}={owner}`" for owner in owners)
                raise UserError(f"expected `{key}` with {needed}, got `{what}={name}`.")
        return found[name](**{key: value for key, value in given.items() if key in found[name].model_fields})

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of the options of all choices of this kind."""
        return list(dict.fromkeys(field for kind in cls.all().values() for field in kind.model_fields))


@cache
def _found(kind: type[Choice]) -> dict[str, type[Choice]]:
    for module in pkgutil.iter_modules(importlib.import_module(kind.package).__path__):
        importlib.import_module(f"{kind.package}.{module.name}")
    found: dict[str, type[Choice]] = {}
    for choice in _subclasses(kind):
        if "name" in vars(choice) and found.setdefault(choice.name, choice) is not choice:
            raise TypeError(f"{choice.name!r} names both {found[choice.name]} and {choice}")
    return dict(sorted(found.items()))


def _subclasses(kind: type[Choice]) -> list[type[Choice]]:
    return [found for direct in kind.__subclasses__() for found in (direct, *_subclasses(direct))]


def check_name(found: Iterable[str], what: str, name: str) -> None:
    """Raise UserError unless there is a choice with that name."""
    if name not in list(found):
        raise UserError(f"expected `{what}` to be {listed(found)}, got {_shown(name)}.")


def _split(value: Any) -> Any:
    """Split `"a,b"` or `["a,b", "c"]` into parts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(part for text in texts for part in text.replace(" ", "").split(",") if part)


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_split)]
Shares = Annotated[tuple[float, ...], BeforeValidator(_split)]
"""Tuples that may also be given as comma-separated text."""
AutoInt = Annotated[int | None, BeforeValidator(lambda value: None if value == "auto" else value)]
"""A number or `auto`, which becomes None."""


def listed(names: Iterable[object]) -> str:
    """Format names as `a, b or c`."""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def different(known: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Describe which values of `mine` differ from `known`: "`seed` was 1, now 2; …", or an empty string."""
    return "; ".join(
        f"`{key}` was {known.get(key)!r}, now {value!r}" for key, value in mine.items() if known.get(key) != value
    )


def _no_option(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [option for option in known if option != name], n=1)
    return f"there is no option {name!r} here{f'; did you mean `{near[0]}`?' if near else '.'}"


def _form(kind: type[Options], name: str) -> str | None:
    """Return how to write an option's value, if its type alone does not say so."""
    examples = kind.model_fields[name].examples
    if not examples:
        return None
    return f"to be {examples[0].replace('|', ' or ')}" if "|" in examples[0] else f"such as {examples[0]}"


def _told(kind: type[Options], error: ErrorDetails) -> str:
    """Turn one of pydantic's errors into our wording."""
    name = str(error["loc"][0]) if error["loc"] else ""
    context, given = error.get("ctx", {}), _shown(error["input"])
    shown = given[1:-1].strip() if isinstance(error["input"], str) else given
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"expected `{name}`, which has no default."
        case "extra_forbidden":
            beside = (option for choice in kind.choice_fields().values() for option in choice.option_names())
            return _no_option(name, [*kind.model_fields, *beside])
        case "enum":
            annotation = kind.model_fields[name].annotation
            members = annotation if isinstance(annotation, type) and issubclass(annotation, Enum) else ()
            return f"expected `{name}` to be {listed(members) if members else context['expected']}, got {given}."
        case "greater_than_equal":
            return f"expected `{name}` of at least {context['ge']:g}, got {shown}."
        case "less_than_equal":
            return f"expected `{name}` of at most {context['le']:g}, got {shown}."
        case "greater_than":
            return f"expected `{name}` above {context['gt']:g}, got {shown}."
        case "less_than":
            return f"expected `{name}` below {context['lt']:g}, got {shown}."
        case "finite_number":
            return f"expected `{name}` to be a finite number, got {shown}."
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return f"expected `{name}` {_form(kind, name) or 'to be a whole number'}, got {given}."
        case "float_type" | "float_parsing":
            return f"expected `{name}` {_form(kind, name) or 'to be a number'}, got {given}."
        case "bool_type" | "bool_parsing":
            return f"expected `{name}` to be true or false, got {given}."
        case "string_type" | "string_unicode":
            return f"expected `{name}` to be text, got {given}."
        case "path_type":
            return f"expected `{name}` to be a path, got {given}."
        case "tuple_type":
            return f"expected `{name}` {_form(kind, name) or 'to be a list'}, got {given}."
        case _:
            return f"expected another value for `{name}`, got {given}."


def _has_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(one, bool) for one in value))


def _shown(given: Any) -> str:
    """Return a value as it is shown in a message: in one line, which is not long."""
    shown = " ".join(repr(given).split())
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
