"""How every figure looks: Okabe and Ito's colours, line styles that tell rows apart without them, fonts embedded."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ganomaly_plugin.errors import InvalidInput

WIDTH = 3.3  # inches: one column of a two-column paper
FORMATS = ("pdf", "svg", "png")
#: Okabe and Ito, "Color Universal Design", 2008, less yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>"
SHOWN = 8  # rows in a figure of curves; more would be unreadable
INK = "#101112"  # replaced by the page's colour where a figure is set into a page
_PAPER = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 8,
    "legend.fontsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType, embedded, as publishers ask
    "ps.fonttype": 42,
    "svg.fonttype": "none",  # text stays text
}


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Draw within: the style of all figures."""
    with matplotlib.rc_context(_PAPER):
        yield


def new_figure(height: float = 2.4) -> Figure:
    """An empty figure one column wide; no window system is asked for one."""
    return Figure(figsize=(WIDTH, height))


def style_of(k: int) -> dict[str, str]:
    """Colour and line style of the `k`-th row."""
    colour = INK if COLOURS[k % len(COLOURS)] == "#000000" else COLOURS[k % len(COLOURS)]
    return {"color": colour, "linestyle": LINES[(k // len(COLOURS) + k) % len(LINES)]}


def shorten(label: str, width: int = 30) -> str:
    """A label that fits a legend."""
    plain = "".join(char if char.isprintable() else "?" for char in label).replace("$", r"\$")
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def legend_below(figure: Figure, count: int) -> None:
    """A legend under the axes, where no curve is."""
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if longest < 22 and count > 1 else 1)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PDF, SVG or PNG (300 dpi), by the file's ending.

    Raises:
        InvalidInput: The ending is another, or the file cannot be written.
    """
    kind = path.suffix[1:].lower()
    if kind not in FORMATS:
        raise InvalidInput(f"--out must end in .pdf, .svg or .png, got {path.name!r}.")
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    try:
        with matplotlib.rc_context({**_PAPER, "svg.hashsalt": "ganomaly"}):
            figure.savefig(path, format=kind, dpi=300, metadata=dated)
    except OSError as error:
        raise InvalidInput(f"Cannot write {path}: {error.strerror or error}. Choose another --out.") from error


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for a page: its ink takes the page's colour, its ids carry `name`."""
    from html import escape

    buffer = io.StringIO()
    with matplotlib.rc_context({**_PAPER, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z]+[A-Za-z0-9]*_\d+"', "", text)  # groups that nothing refers to
    text = text.replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", text)  # hundredths of a point
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def choose_rows(rows: Sequence[str], means: dict[str, float], limit: int = SHOWN) -> tuple[list[str], str]:
    """At most `limit` rows with the highest means, in their order, and a note on those left out ("" when none)."""
    if len(rows) <= limit:
        return list(rows), ""
    best = set(sorted(rows, key=lambda row: -means.get(row, -1.0))[:limit])
    return [row for row in rows if row in best], f"the {limit} best of {len(rows)} detectors"
