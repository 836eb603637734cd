"""What accuracy costs: the mean AUROC against seconds of fitting and of scoring."""

from __future__ import annotations

import math

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.costs import cost_frame
from ganomaly_plugin.report.figures.legend import clipped, columns, drawn, marker_style
from ganomaly_plugin.report.figures.style import Canvas, Drawing, log_axis, new_figure
from ganomaly_plugin.report.groups import Group


def speed(group: Group, canvas: Canvas) -> Drawing:
    """A point a detector, in two panels: scoring an image, and fitting.

    Raises:
        InvalidInput: No job has its seconds.
    """
    costs = {str(row["detector"]): row for row in cost_frame(group.runs).to_dict("records")}
    chosen, note = drawn(group, most=14)
    figure = new_figure(canvas.width, 0.75 * canvas.width + 0.16 * len(chosen) + 0.2)
    panels = figure.subplots(1, 2, sharey=True)
    names = group.names()
    shown = 0
    for axes, column, text in zip(
        panels, ("score_ms_per_image", "fit_s"), ("scoring, ms an image", "fitting, s a job"), strict=True
    ):
        for k, name in enumerate(chosen):
            seconds = float(costs[name][column])
            if seconds > 0 and math.isfinite(seconds):
                shown += 1
                face = "none" if k >= len(canvas.theme.colours) else canvas.theme.colours[k % len(canvas.theme.colours)]
                style = marker_style(group.colour(name), canvas.theme)
                axes.plot(seconds, group.mean(name), linestyle="", markerfacecolor=face, markersize=6, **style)
        axes.margins(0.12)
        log_axis(axes, "x")
        axes.set_xlabel(text)
    if not shown:
        raise InvalidInput(f"No job on {group.title} says how long it took.")
    panels[0].set_ylabel("mean AUROC")
    _key(figure, group, chosen, names, canvas)
    caption = (
        f"Mean AUROC against the median seconds of a job on {group.title}, as each machine happened to be busy: compare orders "
        f"of magnitude; bench speed measures side by side. {note}"
    )
    return Drawing(figure, caption.strip())


def _key(figure: object, group: Group, chosen: tuple[str, ...], names: dict[str, str], canvas: Canvas) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for k, name in enumerate(chosen):
        style = marker_style(group.colour(name), canvas.theme)
        face = "none" if k >= len(canvas.theme.colours) else style["color"]
        handles.append(Line2D([], [], linestyle="", markerfacecolor=face, **style))
    texts = clipped([names[name] for name in chosen])
    figure.legend(handles, texts, loc="outside lower left", ncols=columns(texts, canvas.width), handlelength=1)  # type: ignore[attr-defined]
