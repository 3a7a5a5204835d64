"""Drawings for people: small matplotlib panels in one palette, as files and as inline SVG that follows the page's light or dark theme.

matplotlib's object API: no pyplot, no global figure state, nothing kept. A panel is narrow enough to be read on a phone; a page sets
several side by side. Every colour that a panel uses is a name of the palette, so that `themed_svg` can turn it into a CSS variable.
Colours follow Okabe and Ito, which colour-blind readers can tell apart, darkened where white paper needs it.
"""

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

INK, PAPER, GRID = "#1b1f24", "#ffffff", "#d5dae0"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072b2", "#c77700", "#009e73", "#d55e00", "#a8558a", "#777777"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, GREY)
"""Colours in the order in which series take them."""
PALETTE = {
    "ink": (INK, "#e4e8ec"),
    "paper": (PAPER, "#14171a"),
    "grid": (GRID, "#3a4047"),
    "blue": (BLUE, "#62b5ec"),
    "orange": (ORANGE, "#f0ad3a"),
    "green": (GREEN, "#2fc79a"),
    "vermilion": (VERMILION, "#ff8a4c"),
    "purple": (PURPLE, "#e09bc8"),
    "grey": (GREY, "#9aa2ab"),
}
"""CSS variable -> its colour on light and on dark paper."""
WIDTH_IN, HEIGHT_IN, DPI = 4.6, 3.2, 150
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp, in the reader's own font
    "svg.hashsalt": "lowmem",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.titlesize": 11,
    "lines.linewidth": 1.8,
}
XML_LINK = ' xmlns:xlink="http://www.w3.org/1999/xlink"'


def panel(title: str, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    """An empty panel with one pair of axes. Wider than the default it is no longer easy to read on a phone."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True)
        ax.set_axisbelow(True)
        ax.set_title(title, loc="left")
    return figure, ax


def svg_text(figure: Figure) -> str:
    """The panel as an SVG document in the colours of light paper, on no background."""
    text = io.StringIO()
    _tidy(figure)
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def png_bytes(figure: Figure) -> bytes:
    data = io.BytesIO()
    _tidy(figure)
    with matplotlib.rc_context(STYLE):
        figure.savefig(data, format="png", dpi=DPI, facecolor=PAPER)
    return data.getvalue()


def themed_svg(document: str, name: str) -> str:
    """The drawing of an SVG document for use inside a page: colours as CSS variables, identifiers that start with `name`."""
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", document[document.index("<svg") :], flags=re.DOTALL)
    drawing = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', drawing.replace(XML_LINK, ""))
    drawing = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', drawing).replace("url(#", f"url(#{name}-")
    opening, rest = drawing.split(">", 1)
    opening = re.sub(r'\s(width|height|version|xmlns)="[^"]*"', "", opening)
    for variable, (light, _) in PALETTE.items():
        rest = re.sub(re.escape(light) + r"\b", f"var(--{variable})", rest, flags=re.IGNORECASE)
    return f"{opening}>{rest}".strip()


def css_variables(dark: bool) -> str:
    return " ".join(f"--{name}: {colours[dark]};" for name, colours in PALETTE.items())


def _tidy(figure: Figure) -> None:
    """What was added to a panel after it was made, in the panel's style: no text in plain black, no frames around legends."""
    for text in figure.findobj(Text):
        if to_hex(text.get_color()) == "#000000":
            text.set_color(INK)
    for legend in figure.findobj(Legend):
        legend.set_frame_on(False)
