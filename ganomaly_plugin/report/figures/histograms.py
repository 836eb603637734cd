"""How a detector's scores of normal and of anomalous test images lie, one panel a detector."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ganomaly_plugin.metrics import ROUNDING, scale_of
from ganomaly_plugin.report.figures.legend import LINE, clipped, missing, remark
from ganomaly_plugin.report.figures.style import Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group

BINS = 40
PANELS = 12  # in one figure


def standardised(group: Group, detector: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of normal and of anomalous test images, pooled over the detector's jobs.

    Scores of two trainings share no scale. Each job's are shifted by the median and divided by the interquartile range of
    its scores of normal reference images.
    """
    normal, anomalous = [], []
    for record in group.jobs(detector):
        arrays = group.arrays(record)
        reference = arrays["reference_score"]
        low, middle, high = np.percentile(reference, [25, 50, 75])
        scale = high - low if high - low > ROUNDING * max(abs(low), abs(high)) else scale_of(reference, reference.std())
        score = (arrays["score"] - middle) / scale
        normal.append(score[~arrays["is_anomaly"]])
        anomalous.append(score[arrays["is_anomaly"]])
    return np.concatenate(normal), np.concatenate(anomalous)


def binned(normal: np.ndarray, anomalous: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin edges `(bins + 1,)` and the share of each kind in each bin; what lies outside is counted in the end bins."""
    low = min(np.percentile(normal, 0.5), np.percentile(anomalous, 0.5))
    high = max(np.percentile(normal, 99), np.percentile(anomalous, 97))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = [np.histogram(np.clip(each, edges[0], edges[-1]), edges)[0] / len(each) for each in (normal, anomalous)]
    return edges, shares[0], shares[1]


def histogram(group: Group, detector: str, canvas: Canvas) -> Drawing:
    """One detector's panel, for a page that says what all of them are."""
    return replace(
        _draw(group, (detector,), canvas, ""),
        caption=f"{detector}: mean AUROC {group.mean(detector):.3f}{missing(group, detector)}",
    )


def histograms(group: Group, canvas: Canvas) -> Drawing:
    """A panel for each of the best detectors."""
    chosen = group.detectors[:PANELS]
    return _draw(group, chosen, canvas, remark(group, group.detectors, PANELS))


def _draw(group: Group, detectors: tuple[str, ...], canvas: Canvas, note: str) -> Drawing:
    columns = max(1, min(len(detectors), round(canvas.width / 1.7) if len(detectors) > 1 else 1))
    rows = math.ceil(len(detectors) / columns)
    panel = canvas.width / columns
    names = group.names()
    titles = clipped([names[name] for name in detectors], round(12.5 * panel))
    more = LINE * max(text.count("\n") for text in titles)  # lines but the first
    figure = new_figure(canvas.width, rows * (min(1.5, 0.62 * panel) + more) + 0.45)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name, title in zip(grid.flat, detectors, titles, strict=False):
        edges, normal, anomalous = binned(*standardised(group, name))
        for shares, colour in ((normal, canvas.theme.normal), (anomalous, canvas.theme.anomalous)):
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(
                shares, edges, color=colour, linewidth=1.1, linestyle="-" if colour == canvas.theme.normal else (0, (3, 1))
            )
        axes.set_title(title, loc="left", fontsize=7)
        axes.text(1, 0.98, f"{group.mean(name):.3f}", transform=axes.transAxes, ha="right", va="top", fontsize=7)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        axes.margins(x=0)
    for axes in grid.flat[len(detectors) :]:
        axes.set_visible(False)
    _key(figure, canvas)
    figure.supxlabel("score, in interquartile ranges above the median normal", fontsize=7)
    caption = (
        f"Scores of normal and anomalous test images of all jobs on {group.title}, each job's standardised on its normal "
        f"reference images; end bins hold what lies outside; in the corner the mean AUROC. {note}"
    )
    return Drawing(figure, caption.strip())


def _key(figure: Any, canvas: Canvas) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=canvas.theme.normal), Line2D([], [], color=canvas.theme.anomalous, linestyle=(0, (3, 1)))]
    figure.legend(handles, ["normal", "anomalous"], loc="outside upper left", ncols=2)
