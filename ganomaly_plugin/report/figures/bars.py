"""One bar a class and detector, its length the mean AUROC over seeds, its whisker the standard deviation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.figures.legend import LETTER, LINE, clipped, columns, drawn
from ganomaly_plugin.report.figures.style import DRAWN, Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group

THINNEST = 0.055  # inches a bar; with less the bars lie on their side, and the figure grows downwards
TALLEST = 9.0  # inches
SLANT = 60  # degrees, of class names that are too long to stand side by side


def bars(group: Group, canvas: Canvas) -> Drawing:
    """Bars of the best detectors, upright where they fit the width, else on their side.

    Raises:
        InvalidInput: There are too many classes for one figure.
    """
    chosen, note = drawn(group)
    slots = len(group.table.columns) * (len(chosen) + 1)
    upright = slots * THINNEST <= canvas.width - 0.6
    length = slots * max(THINNEST, 0.075) + 0.8
    if not upright and length > TALLEST:
        raise InvalidInput(
            f"{len(group.table.classes)} classes × {len(chosen)} detectors make {slots} bars, too many for one figure. "
            "bench plot bars --classes or --detectors names some."
        )
    names = group.names()
    texts = clipped([names[name] for name in chosen])
    ncols = columns(texts, canvas.width)
    key = LINE * (math.ceil(len(texts) / ncols) * max(1 + text.count("\n") for text in texts) - 1)  # lines but the first
    ticks = clipped(group.table.columns, 18)
    slot = (canvas.width - 0.6) / (len(ticks) + 0.35)  # inches
    longest = LETTER * max(len(line) for text in ticks for line in text.splitlines())
    slanted = upright and longest >= slot
    figure = new_figure(canvas.width, key + (2.4 + slanted * math.sin(math.radians(SLANT)) * longest if upright else length))
    axes = figure.subplots()
    thick = 1 / (len(chosen) + 1)
    place = np.arange(len(group.table.columns), dtype=float)
    place[-1] += 0.35  # the mean stands apart
    for k, (name, text) in enumerate(zip(chosen, texts, strict=True)):
        cells = [group.table.cells[name][column] for column in group.table.columns]
        means = [cell.mean for cell in cells]
        spread = [0 if math.isnan(cell.std) else cell.std for cell in cells]
        at = place + (k - (len(chosen) - 1) / 2) * thick
        style: Any = {"color": canvas.theme.colours[group.colour(name) % DRAWN], "label": text}
        whisker: Any = {"ecolor": canvas.theme.ink, "elinewidth": 0.6, "capsize": 0}
        if upright:
            axes.bar(at, means, thick * 0.9, yerr=spread, error_kw=whisker, **style)
        else:
            axes.barh(at, means, thick * 0.9, xerr=spread, error_kw=whisker, **style)
    _axes(axes, upright, place, ticks, slanted, canvas)
    figure.legend(loc="outside upper left", ncols=ncols, handlelength=1)
    seeds = group.table.seeds
    over = f"mean over {seeds} seeds, whiskers one standard deviation" if seeds > 1 else "one seed, so no whiskers"
    return Drawing(figure, f"AUROC by class on {group.title}: {over}; dotted: chance. {note}".strip())


def _axes(axes: Any, upright: bool, place: np.ndarray, texts: list[str], slanted: bool, canvas: Canvas) -> None:
    dotted: Any = {"color": canvas.theme.muted, "linewidth": 0.8, "linestyle": (0, (1, 2))}
    if upright:
        turned: Any = {"rotation": SLANT, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(place, texts, **turned)
        axes.set(ylim=(0, 1), ylabel="AUROC", xlim=(-0.5, place[-1] + 0.5))
        axes.grid(visible=False, axis="x")
        axes.axhline(0.5, **dotted)
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_yticks(place, texts)
        axes.set(xlim=(0, 1), xlabel="AUROC", ylim=(place[-1] + 0.5, -0.5))
        axes.grid(visible=False, axis="y")
        axes.axvline(0.5, **dotted)
        axes.tick_params(axis="y", length=0)
