"""What choosing the epoch on the test set is worth: the test AUROC by epoch, the last epoch against the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import clip, markdown_escape, markdown_row
from ganomaly_plugin.report.figures.legend import clipped, line_style, marker_style, remark
from ganomaly_plugin.report.figures.losses import thinned
from ganomaly_plugin.report.figures.style import DRAWN, Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group

_KEY = "oracle_auroc"


@dataclass(frozen=True)
class Choice:
    """One detector on one data set: means over its jobs.

    Attributes:
        dataset: The data set.
        detector: The detector's label.
        last: AUROC of the last epoch: the result.
        best: AUROC of each job's best test epoch: an oracle, no result.
        by_epoch: AUROC after each epoch.
        jobs: How many jobs.
    """

    dataset: str
    detector: str
    last: float
    best: float
    by_epoch: np.ndarray
    jobs: int

    @property
    def gain(self) -> float:
        """What the choice of the epoch on the test set adds."""
        return self.best - self.last


def choices(group: Group) -> list[Choice]:
    """A row for each detector whose jobs noted the test AUROC after every epoch, all of as many, the best detector first."""
    found = []
    for name in group.detectors:
        jobs = [record for record in group.jobs(name) if record.history and all(_KEY in epoch for epoch in record.history)]
        if not jobs or len(jobs) < len(group.jobs(name)) or len({len(record.history) for record in jobs}) > 1:
            continue
        curves = np.array([[epoch[_KEY] for epoch in record.history] for record in jobs])
        last = float(np.mean([record.metrics["auroc"] for record in jobs]))
        found.append(Choice(group.dataset, name, last, float(curves.max(axis=1).mean()), curves.mean(axis=0), len(jobs)))
    return found


def epochs(groups: Sequence[Group], canvas: Canvas) -> Drawing:
    """A panel for each data set: AUROC by epoch, the last epoch as a point, the mean of the best test epochs as a line.

    Raises:
        InvalidInput: No job noted its test AUROC after every epoch.
    """
    found = [(group, made) for group in groups if (made := choices(group))]
    if not found:
        raise InvalidInput(
            "No job here noted its test AUROC after every epoch: only the protocol one-anomalous/paper-v1 does. "
            "Run with --protocols one-anomalous/paper-v1."
        )
    lines = min(DRAWN, max(len(made) for _, made in found))
    figure = new_figure(canvas.width, len(found) * (1.65 + 0.15 * lines))
    for axes, (group, made) in zip(figure.subplots(len(found), 1, squeeze=False).flat, found, strict=True):
        _panel(axes, group, made[:DRAWN], canvas)
    figure.supxlabel("epoch", fontsize=8)
    caption = (
        "Test AUROC after each epoch, mean over jobs; the point: the last epoch, which is the result; the level line at the "
        "right: the mean of each job's best test epoch, an oracle and no result."
    )
    said = [(group, text) for group, made in found if (text := remark(group, [choice.detector for choice in made], DRAWN))]
    caption = " ".join([caption, *(f"{group.dataset}: {text}" if len(found) > 1 else text for group, text in said)])
    return Drawing(figure, caption, table([choice for _, made in found for choice in made]))


def _panel(axes: Any, group: Group, made: list[Choice], canvas: Canvas) -> None:
    from matplotlib.ticker import MaxNLocator

    names = group.names()
    texts = clipped([names[choice.detector] for choice in made])
    for place, (choice, text) in enumerate(zip(made, texts, strict=True)):
        k = group.colour(choice.detector) if len(group.detectors) <= DRAWN else place  # some would share a colour
        style, n = line_style(k, canvas.theme), len(choice.by_epoch)
        shown = thinned(n)
        label = f"{choice.last:.3f} / {choice.best:.3f}  {text}"
        axes.plot(shown + 1, choice.by_epoch[shown], label=label, **style)
        axes.plot(n, choice.last, linestyle="", **marker_style(k, canvas.theme))
        axes.plot([n + 0.3, 1.12 * n + 0.3], [choice.best] * 2, color=style["color"], linewidth=2)
    low = min(float(choice.by_epoch[len(choice.by_epoch) // 3 :].min()) for choice in made)
    high = max(choice.best for choice in made)
    pad = 0.12 * (high - low) or 0.01
    axes.set_ylim(low - pad, high + pad)
    axes.set(ylabel="test AUROC")
    longest = max(len(choice.by_epoch) for choice in made)
    axes.set_xticks([at for at in MaxNLocator(6, integer=True).tick_values(1, longest) if 1 <= at <= longest])
    title = f"{clip(group.dataset)}\n{group.extent}: last / best test epoch"
    key = axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), alignment="left", title=title)
    key.get_title().set_fontsize(8)


def table(made: Sequence[Choice]) -> str:
    """The numbers of the figure as Markdown."""
    rows = [["data set", "detector", "jobs", "last epoch", "best test epoch (oracle)", "difference"], ["---"] * 6]
    for choice in made:
        names = [markdown_escape(choice.dataset), markdown_escape(choice.detector), str(choice.jobs)]
        rows.append([*names, f"{choice.last:.3f}", f"{choice.best:.3f}", f"{choice.gain:+.3f}"])
    return "".join(f"{markdown_row(row)}\n" for row in rows)
