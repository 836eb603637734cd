"""Training losses by epoch, one panel a detector."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.figures.legend import clipped, remark
from ganomaly_plugin.report.figures.style import DASHES, DRAWN, LEAST_RATIO, Canvas, Drawing, log_axis, new_figure
from ganomaly_plugin.report.groups import Group

NOT_LOSSES = ("oracle_auroc",)
PANELS = 12
POINTS = 150  # of a curve: more is not to be seen in print


def loss_curves(group: Group, detector: str) -> dict[str, np.ndarray]:
    """For each loss `(3, epochs)`: the mean over the detector's jobs, the least and the largest; NaN where it has none."""
    histories = [record.history for record in group.jobs(detector)]
    names = dict.fromkeys(name for history in histories for epoch in history for name in epoch if name not in NOT_LOSSES)
    length = max((len(history) for history in histories), default=0)
    found = {}
    for name in names:
        grid = np.full((len(histories), length), np.nan)
        for k, history in enumerate(histories):
            grid[k, : len(history)] = [epoch.get(name, math.nan) for epoch in history]
        there = ~np.isnan(grid).all(axis=0)
        curve = np.full((3, length), np.nan)
        curve[:, there] = [np.nanmean(grid[:, there], 0), np.nanmin(grid[:, there], 0), np.nanmax(grid[:, there], 0)]
        found[name] = curve
    return found


def thinned(n: int) -> np.ndarray:
    """Positions of at most POINTS of `n` epochs, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))


def losing(group: Group) -> list[str]:
    """The detectors whose jobs recorded losses, the best first."""
    return [
        name
        for name in group.detectors
        if any(set(epoch) - set(NOT_LOSSES) for record in group.jobs(name) for epoch in record.history)
    ]


def losses(group: Group, canvas: Canvas) -> Drawing:
    """A panel for each of the best detectors that train.

    Raises:
        InvalidInput: None of them recorded a loss.
    """
    there = losing(group)
    if not there:
        raise InvalidInput(f"No job on {group.title} recorded a loss: none of its detectors trains in epochs.")
    return _draw(group, there[:PANELS], canvas, remark(group, there, PANELS))


def loss(group: Group, detector: str, canvas: Canvas) -> Drawing:
    """One detector's panel, for a page that says what all of them are."""
    return replace(_draw(group, [detector], canvas, ""), caption=detector)


def _draw(group: Group, detectors: list[str], canvas: Canvas, note: str) -> Drawing:
    columns = max(1, min(len(detectors), int(canvas.width / 3.2)))
    rows = math.ceil(len(detectors) / columns)
    figure = new_figure(canvas.width, rows * 1.75 + 0.25)
    grid = figure.subplots(rows, columns, squeeze=False)
    names = group.names()
    titles = clipped([names[detector] for detector in detectors], 40)
    for axes, detector, title in zip(grid.flat, detectors, titles, strict=False):
        curves = loss_curves(group, detector)
        for k, (name, (mean, low, high)) in enumerate(curves.items()):
            colour, shown = canvas.theme.colours[k % DRAWN], thinned(len(mean))
            mean, low, high, epoch = mean[shown], low[shown], high[shown], shown + 1
            axes.fill_between(epoch, low, high, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(mean) == 1 else ""
            label = "validation (held out)" if name == "validation" else name  # of select=normal-val: no loss
            axes.plot(epoch, mean, color=colour, linestyle=DASHES[k % DRAWN], marker=marker, label=label)
        least, largest = (take([take(curve) for curve in curves.values()]) for take in (np.nanmin, np.nanmax))
        if least > 0 and largest / least >= LEAST_RATIO:
            log_axis(axes, "y")
        axes.set_title(title, loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, handlelength=1.8)
    for axes in grid.flat[len(detectors) :]:
        axes.set_visible(False)
    figure.supxlabel("epoch", fontsize=7)
    return Drawing(figure, f"Training losses on {group.title}: mean over jobs, shaded from least to largest. {note}".strip())
