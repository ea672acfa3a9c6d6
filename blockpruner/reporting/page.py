"""Writes one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from blockpruner.showing.measurements import Table


@dataclass(frozen=True)
class Image:
    svg: str
    """The SVG figure in base 64."""
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    images: Sequence[Image] = ()
    tables: Sequence[Table] = ()
    code: str = ""


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Render the page. All content from runs and files is escaped."""
    environment = Environment(
        loader=PackageLoader("blockpruner.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(title=title, sections=sections)
