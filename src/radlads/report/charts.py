"""One drawing, two files: a chart as PNG, and as SVG for the page, in the page's colours.

Owns the look of charts and how their colours become the page's. Leaves what is drawn to plots.py.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Each colour stands for the page's variable of that name, which has another value in the dark
COLOURS = {
    "ink": "#24292f",
    "muted": "#6e7781",
    "line": "#d8dee4",
    "teacher": "#8250de",
    "student": "#0a7d33",
    "setup": "#9a6701",
    "align": "#0969d1",
    "distill": "#bc4c01",
    "extend": "#1b7c82",
    "instruct": "#bf3988",
}
_WIDTH_IN, _PNG_DPI = 5.2, 160
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["line"],
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.minor.visible": False,
}


@dataclass(frozen=True)
class Chart:
    """name: of the PNG file, and unique on the page. title: what is shown. draw: draws it into empty axes."""

    name: str
    title: str
    draw: Callable[[Axes], None]
    height_in: float = 3.0

    def save_png(self, folder: Path) -> Path:
        """Write folder/NAME.png, light, with its title; returns its path."""
        path = folder / f"{self.name}.png"
        with matplotlib.rc_context(_STYLE):
            self._figure(titled=True).savefig(path, dpi=_PNG_DPI, facecolor="white")
        return path

    def svg(self) -> str:
        """An <svg> element to stand in a page that has a CSS variable for each of COLOURS; as wide as its place."""
        file = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": self.name}):
            self._figure(titled=False).savefig(file, format="svg", transparent=True, metadata=metadata)
        return self._for_page(file.getvalue())

    def _figure(self, *, titled: bool) -> Figure:
        figure = Figure(figsize=(_WIDTH_IN, self.height_in + 0.25 * titled), layout="constrained")
        axes = figure.add_subplot()
        self.draw(axes)
        if titled:
            axes.set_title(self.title, loc="left")
        return figure

    def _for_page(self, svg: str) -> str:
        """The element alone: named for readers who cannot see it, no size, the page's colours and type."""
        svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        opening, _, inside = svg.partition(">")
        view = re.search(r'viewBox="[^"]*"', opening)
        assert view is not None
        for name, colour in COLOURS.items():
            inside = inside.replace(colour, f"var(--{name})")
        # The salt makes the ids that are referred to the chart's own; the others stand in every chart
        inside = re.sub(r' id="(?!(?:m|p)[0-9a-f]{10}")[^"]*"', "", inside)
        inside = re.sub(r" font-family: [^;\"]*;?", "", inside)
        return f'<svg {view.group()} role="img" aria-label="{escape(self.title)}">{inside}'
