"""One self-contained HTML page from titled sections: no network, no script, light and dark, wide and narrow.

How to add a page for a new kind of result (a profile, say):

    figure, ax = panel("Step time")                      # results/charts.py; colours from its palette
    ax.plot(sizes, seconds, color=BLUE)
    page = Page(
        title="Profile of resnet50",
        lead="The sweet spot is 4 threads and micro-batches of 32.",
        sections=(
            Section("Sweet spot", Cards((("images/s", "812"), ("peak", "3.1 GiB")))),
            Section("Time", Figures(Drawing.of(figure, "Seconds per step by micro-batch; bars: the middle half of 9 steps."))),
            Section("Steps", Table(("micro-batch", "s"), (("32", "0.41"), ("64", "0.79")), bold=(0,))),
            Section("Plan", Lines(plan_lines(plan))),
            measured_section(machine, ("9 rounds of 5 steps, interleaved",)),    # results/measured.py
        ),
    )
    write_page(page, folder / "report.html")

and a line in `REPORTS` of `lowmem/reporting.py`, so that `lowmem report FOLDER` makes it again from what was saved. A section without
parts is left out, so a page can be made from a result that is not finished.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from lowmem.disk import replace_file
from lowmem.results.charts import css_variables, svg_text, themed_svg


@dataclass(frozen=True)
class Cards:
    """Figures that stand for the whole: (what, value) each."""

    kind: ClassVar[str] = "cards"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Lines:
    """Lines as they are, long ones wrapped; `folded` hides them behind their title."""

    kind: ClassVar[str] = "lines"
    lines: Iterable[str]
    folded: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Table:
    """Cells of text; scrolls sideways where the screen is narrow.

    `bold`: numbers of the rows to stress; `faint`: of those that are not measurements; `left`: columns that hold words.
    """

    kind: ClassVar[str] = "table"
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Sequence[int] = ()
    faint: Sequence[int] = ()
    left: Sequence[int] = (0,)
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """An SVG document and what it shows."""

    svg: str
    caption: str

    @classmethod
    def of(cls, figure: Figure, caption: str) -> "Drawing":
        return cls(svg_text(figure), caption)


@dataclass(frozen=True, init=False)
class Figures:
    """Drawings side by side where there is room; `wide` ones get the whole width."""

    kind: ClassVar[str] = "figures"
    drawings: tuple[Drawing, ...]
    wide: bool

    def __init__(self, *drawings: Drawing, wide: bool = False) -> None:
        object.__setattr__(self, "drawings", drawings)
        object.__setattr__(self, "wide", wide)


Part = Cards | Text | Lines | Table | Figures


@dataclass(frozen=True, init=False)
class Section:
    """A heading and what stands below it; without anything below it, it does not appear."""

    title: str
    parts: tuple[Part, ...]

    def __init__(self, title: str, *parts: Part) -> None:
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Page:
    """`title` names the thing; `lead` says in a sentence or two what was found."""

    title: str
    lead: str
    sections: Sequence[Section]


def page_html(page: Page) -> str:
    """The page as one HTML document."""
    return _template().render(page=page, light=Markup(css_variables(dark=False)), dark=Markup(css_variables(dark=True)))


def write_page(page: Page, path: Path) -> Path:
    """Write the page, replacing an older one in a single step."""
    replace_file(path, page_html(page))
    return path


@lru_cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("lowmem.results", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["themed"] = lambda document, name: Markup(themed_svg(document, name))
    return environment.get_template("page.html.jinja")
