"""ROC and precision–recall curves, averaged over jobs so that the area under each is the mean in the table."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.report.figures.legend import drawn, key, line_style
from ganomaly_plugin.report.figures.style import Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group, class_of

GRID = np.linspace(0, 1, 101)


def mean_roc(group: Group, detector: str) -> np.ndarray:
    """True-positive rate at each false-positive rate of GRID, the mean over the detector's jobs."""
    return np.mean([roc_at(*_truth_and_score(group, record)) for record in group.jobs(detector)], axis=0)


def mean_precision(group: Group, detector: str) -> np.ndarray:
    """Precision at each recall of GRID, the mean over the detector's jobs."""
    return np.mean([precision_at(*_truth_and_score(group, record)) for record in group.jobs(detector)], axis=0)


def roc_at(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """True-positive rates `(101,)` at GRID; where the curve rises upright, its upper end."""
    false_positive, true_positive, _ = roc_curve(truth, score)
    left = np.searchsorted(false_positive, GRID, side="right") - 1
    right = np.minimum(left + 1, len(false_positive) - 1)
    span = false_positive[right] - false_positive[left]
    share = np.divide(GRID - false_positive[left], span, out=np.zeros_like(GRID), where=span > 0)
    return true_positive[left] + share * (true_positive[right] - true_positive[left])


def precision_at(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Precisions `(101,)` at GRID: that of the strictest threshold with such a recall, as in average precision."""
    precision, recall, _ = precision_recall_curve(truth, score)
    precision, recall = precision[::-1], recall[::-1]  # recall now rises from 0
    position = np.searchsorted(recall, np.maximum(GRID, 1e-12) - 1e-12, side="left")
    return precision[np.minimum(np.maximum(position, 1), len(precision) - 1)]


def _truth_and_score(group: Group, record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    arrays = group.arrays(record)
    return arrays["is_anomaly"], arrays["score"]


def roc(group: Group, canvas: Canvas) -> Drawing:
    """ROC curves of the best detectors."""
    chosen, note = drawn(group)
    figure = new_figure(canvas.width, 0.95 * canvas.width + 0.15 * len(chosen) + 0.3)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=canvas.theme.muted, linewidth=0.7, linestyle=(0, (1, 2)))
    for name in chosen:
        curve = np.r_[0, mean_roc(group, name)]  # the grid starts at the top of a first upright rise
        axes.plot(np.r_[0, GRID], curve, **line_style(group.colour(name), canvas.theme))
    _unit_square(axes, "false-positive rate", "true-positive rate")
    key(axes, group, chosen, canvas.theme, f"mean AUROC, {group.extent}")
    return Drawing(figure, f"ROC curves, the mean of those of all jobs, on {group.title}. {note}".strip())


def precision_recall(group: Group, canvas: Canvas) -> Drawing:
    """Precision–recall curves of the best detectors."""
    chosen, note = drawn(group)
    figure = new_figure(canvas.width, 0.95 * canvas.width + 0.15 * len(chosen) + 0.3)
    axes = figure.subplots()
    finished = [record for name in group.detectors for record in group.jobs(name)]
    tested = {(class_of(record), record.job.seed): record.counts for record in finished}  # alike for all detectors
    chance = float(np.mean([n["test_anomalous"] / (n["test_normal"] + n["test_anomalous"]) for n in tested.values()]))
    axes.axhline(chance, color=canvas.theme.muted, linewidth=0.7, linestyle=(0, (1, 2)))
    means = {}
    for name in chosen:
        axes.plot(GRID, mean_precision(group, name), **line_style(group.colour(name), canvas.theme))
        means[name] = float(np.mean([record.metrics["auprc"] for record in group.jobs(name)]))
    _unit_square(axes, "recall", "precision")
    key(axes, group, chosen, canvas.theme, f"mean AUPRC, {group.extent}", values=means)
    caption = f"Precision–recall curves, the mean of those of all jobs, on {group.title}; dotted: chance, {chance:.2f}. {note}"
    return Drawing(figure, caption.strip())


def _unit_square(axes: Any, x: str, y: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
