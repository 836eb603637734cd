"""What accuracy costs: the mean AUROC against seconds of fitting and of scoring."""

from __future__ import annotations

import math
from typing import Any

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.costs import cost_frame
from ganomaly_plugin.report.figures.legend import clipped, columns, drawn, marker_style
from ganomaly_plugin.report.figures.style import DRAWN, Canvas, Drawing, Theme, log_axis, new_figure
from ganomaly_plugin.report.groups import Group


def speed(group: Group, canvas: Canvas) -> Drawing:
    """A point a detector, in two panels: scoring an image, and fitting.

    Raises:
        InvalidInput: No job has its seconds.
    """
    from matplotlib.lines import Line2D

    costs = {str(row["detector"]): row for row in cost_frame(group.runs).to_dict("records")}
    chosen, note = drawn(group, most=14)
    figure = new_figure(canvas.width, 0.75 * canvas.width + 0.16 * len(chosen) + 0.2)
    panels = figure.subplots(1, 2, sharey=True)
    styles = {name: _style(k, canvas.theme) for k, name in enumerate(chosen)}
    shown = 0
    for axes, column, text in zip(
        panels, ("score_ms_per_image", "fit_s"), ("scoring, ms an image", "fitting, s a job"), strict=True
    ):
        for name in chosen:
            seconds = float(costs[name][column])
            if seconds > 0 and math.isfinite(seconds):
                shown += 1
                axes.plot(seconds, group.mean(name), markersize=6, **styles[name])
        axes.margins(0.12)
        log_axis(axes, "x")
        axes.set_xlabel(text)
    if not shown:
        raise InvalidInput(f"No job on {group.title} says how long it took.")
    panels[0].set_ylabel("mean AUROC")
    names = group.names()
    texts = clipped([names[name] for name in chosen])
    handles = [Line2D([], [], **styles[name]) for name in chosen]
    figure.legend(handles, texts, loc="outside lower left", ncols=columns(texts, canvas.width), handlelength=1)
    caption = (
        f"Mean AUROC against the median seconds of a job on {group.title}, as each machine happened to be busy: compare orders "
        f"of magnitude; bench speed measures side by side. {note}"
    )
    return Drawing(figure, caption.strip())


def _style(k: int, theme: Theme) -> dict[str, Any]:
    """How the point of the `k`-th detector looks: hollow where its colour and shape are another's too."""
    style = marker_style(k, theme)
    return {**style, "linestyle": "", "markerfacecolor": style["color"] if k < DRAWN else "none"}
