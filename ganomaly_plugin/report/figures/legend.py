"""Which detectors a figure shows, how each looks in all figures of a group, and the key that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ganomaly_plugin.escape import clip
from ganomaly_plugin.report.figures.style import DASHES, DRAWN, MARKERS, Theme
from ganomaly_plugin.report.groups import Group

LETTER = 0.058  # inches: what a letter of a key or label of seven points takes on average
LINE = 0.15  # inches: and a line


def columns(texts: Sequence[str], width: float) -> int:
    """How many columns a key of `texts` has across `width` inches."""
    longest = max((len(line) for text in texts for line in text.splitlines()), default=0)
    return max(1, int(width / (LETTER * longest + 0.35)))


def drawn(group: Group, most: int = DRAWN) -> tuple[tuple[str, ...], str]:
    """The detectors to draw, the best first, and what a caption must say of them and of their short names."""
    return group.detectors[:most], remark(group, group.detectors, most)


def remark(group: Group, there: Sequence[str], most: int) -> str:
    """What a caption says when only the first `most` detectors `there` are drawn, when some lack jobs, and of short names."""
    shown = there[:most]
    cut = f"The {most} with the highest mean AUROC of {len(there)} detectors." if len(there) > most else ""
    lacking = ", ".join(name + gap for name in shown if (gap := missing(group, name)))
    partial = f"Means are of fewer jobs, and do not compare, for {lacking}." if lacking else ""
    return " ".join(text for text in (cut, partial, group.common(shown)) if text)


def missing(group: Group, detector: str) -> str:
    """` (3 jobs missing)`, or nothing where none is."""
    n = group.missing(detector)
    return f" ({n} job{'s' * (n > 1)} missing)" if n else ""


def line_style(k: int, theme: Theme) -> dict[str, Any]:
    """Colour and dashes of the line of the `k`-th detector, which is its `Group.colour`."""
    return {"color": theme.colours[k % DRAWN], "linestyle": DASHES[k % DRAWN]}


def marker_style(k: int, theme: Theme) -> dict[str, Any]:
    """Colour and shape of its points."""
    return {"color": theme.colours[k % DRAWN], "marker": MARKERS[k % DRAWN]}


def clipped(texts: Sequence[str], most: int = 34) -> list[str]:
    """`texts`, each clipped unless others would read alike; those are whole, in lines of `most` characters."""
    short = [clip(text, most) for text in texts]
    whole = ["\n".join(text[k : k + most] for k in range(0, len(text), most)) for text in texts]
    return [s if short.count(s) == 1 else w for s, w in zip(short, whole, strict=True)]


def key(
    axes: Any, group: Group, detectors: Sequence[str], theme: Theme, title: str, *, values: Mapping[str, float] | None = None
) -> None:
    """A legend below, of detectors with a number each (default: the mean AUROC); those that lack jobs say how many."""
    from matplotlib.lines import Line2D

    names = group.names()
    handles, texts = [], []
    for name, text in zip(detectors, clipped([names[name] for name in detectors]), strict=True):
        value = group.mean(name) if values is None else values[name]
        texts.append(f"{value:.3f}  {text}{missing(group, name)}")
        handles.append(Line2D([], [], **line_style(group.colour(name), theme)))
    made = axes.figure.legend(handles, texts, title=title, alignment="left", loc="outside lower left")
    made.get_title().set_fontsize(7)
