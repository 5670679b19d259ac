"""A page of facts, tables and pictures as one HTML file: no script, nothing fetched."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# Sizes, percentages, plain numbers and numbers with a unit: they stand at the right.
_NUMBER = re.compile(r"[-+]?(\d[\d,.]*(e[-+]?\d+)?|inf|nan)( [kMGT]?B| MB| %| of \d+)?")


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words: a drawing as SVG, or the address of an image."""

    caption: str
    svg: str = ""
    address: str = ""


@dataclass(frozen=True)
class Link:
    """Text that leads to another file."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """Rows in columns, below their names."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Section:
    """A part of a page, shown in the order of its fields."""

    title: str
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()
    text: str = ""  # shown as it is, such as YAML


@dataclass(frozen=True)
class Page:
    """All of a report."""

    title: str
    status: str
    good: bool  # whether the status is what one hopes for
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def as_html(page: Page) -> str:
    """Return the page; all text in it is escaped."""
    from jinja2 import Environment, StrictUndefined

    from fedsys.report.template import TEMPLATE

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["number"] = lambda text: bool(_NUMBER.fullmatch(text))
    environment.tests["link"] = lambda cell: isinstance(cell, Link)
    return environment.from_string(TEMPLATE).render(page=page)


def image(path: Path, caption: str) -> Picture | None:
    """Return a PNG as part of a page, or None if there is no such file."""
    if not path.is_file():
        return None
    content = base64.b64encode(path.read_bytes()).decode()
    return Picture(caption, address=f"data:image/png;base64,{content}")


def link(text: str, *names: str) -> Link:
    """Return a link to a file below the page's own folder."""
    return Link(text, "/".join(quote(name) for name in names))
