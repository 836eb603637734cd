"""How figures look: colours for print and for a page that may be dark, line styles, sizes, and how they are written."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import WITHOUT_CONTROL
from ganomaly_plugin.files import atomic_write, check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 3.3  # inches: one column of a two-column paper
FORMATS = ("pdf", "svg", "png")
DPI = 300

#: Far apart for every kind of colour vision and at least 3:1 on white; dashes and markers tell detectors apart without any.
COLOURS = ("#1b48dc", "#d18309", "#007a5b", "#8f3491", "#614f09", "#3098f9", "#1b1b26")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
    (0, (7, 2)),
    (0, (2, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: For names in other scripts, the common ones first: on Linux, on macOS, on Windows.
_OTHERS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Segoe UI Emoji"),
)
_MISSING = "Glyph .* missing from"
LEAST_RATIO = 5.0  # of the ends of a logarithmic axis
DRAWN = len(COLOURS)  # detectors in one figure; with more, the best so many


@dataclass(frozen=True)
class Theme:
    """The colours of one medium."""

    ink: str
    muted: str
    grid: str
    normal: str
    anomalous: str
    colours: tuple[str, ...]


PAPER = Theme("#000000", "#595959", "#d9d9d9", COLOURS[0], COLOURS[1], COLOURS)

#: On a page each colour is a CSS variable, so that one SVG suits light and dark: drawn as a placeholder, renamed after.
_PLACEHOLDERS = {f"#fe01{k:02x}": f"var(--{name})" for k, name in enumerate(("ink", "muted", "grid", "normal", "anomalous"))}
_PLACEHOLDERS |= {f"#fe02{k:02x}": f"var(--c{k})" for k in range(DRAWN)}
_NAMES = tuple(_PLACEHOLDERS)
PAGE = Theme(_NAMES[0], _NAMES[1], _NAMES[2], _NAMES[3], _NAMES[4], colours=_NAMES[5:])


@dataclass(frozen=True)
class Canvas:
    """What a figure is drawn for.

    Attributes:
        width: In inches.
        theme: Its colours.
    """

    width: float = COLUMN
    theme: Theme = PAPER


@dataclass(frozen=True)
class Drawing:
    """A figure, what it shows in one sentence, and a Markdown table of its numbers where it has one."""

    figure: Figure
    caption: str
    table: str = ""


def _others() -> list[str]:
    """The fonts of this machine for characters that DejaVu Sans lacks."""
    from matplotlib.font_manager import get_font_names

    here = set(get_font_names())
    return [name for name in _OTHERS if name in here]


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Matplotlib's settings for figures made and written inside; nothing outside changes."""
    import matplotlib

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink
    )
    settings: Any = {
        **ink,
        "font.family": ["DejaVu Sans", *_others()],  # the first comes with Matplotlib: figures look the same everywhere
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.3,
        "lines.markersize": 4.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none" if theme is PAGE else "white",
        "pdf.fonttype": 42,  # TrueType, which journals ask for
        "svg.fonttype": "none" if theme is PAGE else "path",
        "svg.hashsalt": "ganomaly_plugin",
        "path.simplify": True,
        "axes.unicode_minus": True,
        "text.usetex": False,
        "text.parse_math": False,  # a dollar sign in a name is one
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        if theme is PAGE:  # whose texts the browser draws, in fonts of its own
            warnings.filterwarnings("ignore", _MISSING)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, no window behind it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def log_axis(axes: Any, which: str) -> None:
    """Make the "x" or "y" axis logarithmic, its ticks plain numbers, the fewer of a decade the more decades there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    if high / low < LEAST_RATIO:  # a narrow range has no ticks of its own, and looks like more than it is
        middle, half = (low * high) ** 0.5, LEAST_RATIO**0.5
        low, high = middle / half, middle * half
        axes.set(**{f"{which}lim": (low, high)})
    subs = (1, 2, 5) if high / low < 15 else (1, 3) if high / low < 150 else (1,)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=subs, numticks=4))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def check_target(path: Path) -> str:
    """The format that the ending of `path` names.

    Raises:
        InvalidInput: It is none of FORMATS, or `path` cannot be written.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise InvalidInput(f"A figure ends in .pdf, .svg or .png, got {path.name!r}. Give such a name to --out.")
    check_writable(path)
    return form


def save(figure: Figure, path: Path) -> None:
    """Write the figure, the same bytes for the same figure. To be called inside `styled(PAPER)`."""
    form = check_target(path)
    buffer = io.BytesIO()
    undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _MISSING)
        figure.savefig(buffer, format=form, dpi=DPI, metadata=undated[form])
    content = buffer.getvalue()
    if form == "svg":  # which is no XML where a name has control characters
        content = content.decode().translate(WITHOUT_CONTROL).encode()
    atomic_write(path, content)
    missing = set()
    for each in caught:
        if match := re.match(r"Glyph (\d+)", str(each.message)):
            missing.add(chr(int(match[1])))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if missing:
        said = f"{path}: no font here has {' '.join(sorted(missing))}, which are boxes there"
        print(f"{said}. Install one that has, such as {_OTHERS[0]}.".translate(WITHOUT_CONTROL), file=sys.stderr)


def inline_svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element for a page, to be called inside `styled(PAGE)`.

    Args:
        figure: Drawn with the theme PAGE.
        prefix: What its ids begin with; the element `{prefix}text` of the page must say what the figure shows.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|href=\")#([\w.-]+)", rf"\1#{prefix}\2", text)
    text = re.sub(r"(font: [\w. ]*?\d+px) [^;\"]*", r"\1 var(--sans)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', sans-serif", text)  # no fonts of this machine's
    for placeholder, variable in _PLACEHOLDERS.items():
        text = text.replace(placeholder, variable)
    width, height = (float(value) for value in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    head = f'<svg role="img" aria-labelledby="{prefix}text" viewBox="0 0 {width:g} {height:g}">'
    body = text[text.index(">") + 1 :]
    body = re.sub(r"\n\s*", "\n", body).strip()
    return head + body
