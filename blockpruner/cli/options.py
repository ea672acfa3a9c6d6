"""Turns options classes into command-line options, and field names into option names.

A command takes a config as its parameter. Its fields become options with the types, defaults and help text of the
class, so each option is defined once, where it is checked.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from blockpruner.engine.options import Choice, Options
from blockpruner.showing.commands import flag

POSITIONAL = {"model": "MODEL", "folder": "DIR", "runs": "RUN…"}
"""Fields that are positional arguments, with their names in the usage line."""
ENVIRONMENT = {"address": "RAY_ADDRESS"}
"""Options that an environment variable can set."""
known: set[str] = {*POSITIONAL, "out"}
"""Names of all fields that are options of a command."""


def as_options(text: str) -> str:
    """Convert a message for the command line. Fields in backticks become options: `num_remove` becomes --num-remove,
    and `blocks=layer` becomes --blocks layer."""

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in known:
            return match[0]
        shown = POSITIONAL.get(name) or flag(name)
        return shown if value in (None, "True") else f"{shown} {value}"

    return re.sub(r"`([a-z_]+)(?:=([^`]*))?`", option, text)


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with each parameter of an options class replaced by one option per field.

    The returned function creates the config first, so UserError is raised before the original function begins.
    """
    parameters: list[inspect.Parameter] = []
    configs: dict[str, type[Options]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, Options):
            configs[parameter.name] = parameter.annotation
            parameters += _parameters(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    known.update(parameter.name for parameter in parameters)

    def run(**given: Any) -> Any:
        arguments: dict[str, Any] = {}
        for name, config in configs.items():
            values = {key: given.pop(key) for key in _names(config) if key in given}
            arguments[name] = config.of(**_from_environment(values))
        return function(**arguments, **given)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    # Positional arguments come first, then options without a default.
    parameters.sort(key=lambda each: (each.name not in POSITIONAL, each.default is not inspect.Parameter.empty))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _names(config: type[Options]) -> list[str]:
    choices = (name for kind in config.choice_fields().values() for name in kind.option_names())
    return [*config.model_fields, *choices]


def _from_environment(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that were given, including those of the environment. `no_ray` overrides only the latter."""
    given = {name: value for name, value in values.items() if value is not None}
    for name, variable in ENVIRONMENT.items():
        if name in values and name not in given and not given.get("no_ray") and os.environ.get(variable):
            given[name] = os.environ[variable]
    return given


def _parameters(config: type[Options]) -> Iterator[inspect.Parameter]:
    """Yield one parameter per option, in the order of the sections."""
    kinds = config.choice_fields()
    for name, field in config.model_fields.items():
        panel = _panel(config, name)
        if name not in kinds:
            yield _parameter(name, field, panel)
            continue
        choices = kinds[name].all()
        about = "; ".join(f"{one.name}: {one.about}" for one in choices.values())
        option = typer.Option(
            flag(name), help=f"{_help(field)} {about}.", metavar="|".join(choices), rich_help_panel=panel
        )
        yield _keyword(name, Annotated[str, option], field.default.name)
        for option_name in kinds[name].option_names():
            owners = [one for one in choices.values() if option_name in one.model_fields]
            of = owners[0].model_fields[option_name]
            default = _defaults(option_name, owners)
            text = f"With {' or '.join(owner.name for owner in owners)}: {_help(of)}{default}"
            annotation, metavar = _type(of)
            option = typer.Option(flag(option_name), help=text, metavar=metavar, rich_help_panel=panel)
            yield _keyword(option_name, Annotated[annotation | None, option], None)


def _defaults(option_name: str, owners: Sequence[type[Choice]]) -> str:
    """Say the default of an option of some choices, for each of them if they differ."""
    values = {owner.name: owner.model_fields[option_name].default for owner in owners}
    if len(set(values.values())) > 1:
        return f" Default: {', '.join(f'{value} ({name})' for name, value in values.items())}."
    value = next(iter(values.values()))
    return "" if value in (None, ()) else f" Default: {value}."


def _parameter(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    annotation, metavar = _type(field)
    text = _help(field)
    if name in ENVIRONMENT:
        text += f" The environment variable {ENVIRONMENT[name]} sets it, too."
    shared: dict[str, Any] = {"help": text, "metavar": POSITIONAL.get(name) or metavar, "rich_help_panel": panel}
    if get_origin(annotation) is list and field.default not in (PydanticUndefined, ()):
        shared["show_default"] = ",".join(map(str, field.default))
    marker = typer.Argument(**shared) if name in POSITIONAL else typer.Option(flag(name), **shared)
    if field.default is PydanticUndefined:
        return _keyword(name, Annotated[annotation, marker], inspect.Parameter.empty)
    is_plain = annotation in (bool, int, float, str) or (inspect.isclass(annotation) and issubclass(annotation, Enum))
    default = field.default if is_plain else None
    return _keyword(name, Annotated[annotation if default is not None else annotation | None, marker], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _type(field: FieldInfo) -> tuple[Any, str | None]:
    """Return the type for Typer to parse, and the metavar. Other types are passed as text for pydantic to parse."""
    metavar = str(field.examples[0]) if field.examples else None
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else str
    if get_origin(annotation) is tuple:
        return list[Path] if get_args(annotation)[0] is Path else list[str], metavar
    if inspect.isclass(annotation) and (annotation in (bool, Path, str) or issubclass(annotation, Enum)):
        return annotation, metavar
    # A number, unless the option also accepts words.
    return (annotation if annotation in (int, float) and metavar is None else str), metavar


def _help(field: FieldInfo) -> str:
    known.update(POSITIONAL)
    text = " ".join((field.description or "").split())
    return re.sub(r"`([a-z_]+)(?:=([^`]*))?`", lambda match: f"`{_named(match[1], match[2])}`", text)


def _named(name: str, value: str | None) -> str:
    return POSITIONAL.get(name) or flag(name) + (f" {value}" if value else "")


def _panel(config: type[Options], name: str) -> str | None:
    """Return the title (docstring) of the section that defines a field, or None for fields of the config itself."""
    for section in config.__mro__:
        if name in getattr(section, "__annotations__", {}):
            return None if section is config or not section.__doc__ else section.__doc__.splitlines()[0]
    return None
