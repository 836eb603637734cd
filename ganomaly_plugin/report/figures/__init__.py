"""Figures of results, by name; see `bench plot`. Matplotlib is imported when the first is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.report.figures.bars import bars
from ganomaly_plugin.report.figures.curves import precision_recall, roc
from ganomaly_plugin.report.figures.epochs import epochs
from ganomaly_plugin.report.figures.histograms import histograms
from ganomaly_plugin.report.figures.losses import losses
from ganomaly_plugin.report.figures.ranks import critical_difference
from ganomaly_plugin.report.figures.sheets import samples
from ganomaly_plugin.report.figures.speed import speed
from ganomaly_plugin.report.figures.style import Canvas, Drawing
from ganomaly_plugin.report.groups import Group


@dataclass(frozen=True)
class Figure:
    """A kind of figure: `of_one` draws a data set under a protocol, `of_all` all groups together."""

    of_one: Callable[[Group, Canvas], Drawing] | None = None
    of_all: Callable[[Sequence[Group], Canvas], Drawing] | None = None

    def draw(self, groups: Sequence[Group], canvas: Canvas) -> Drawing:
        """The figure of `groups`, of which there must be one where only one can be shown.

        Raises:
            InvalidInput: Several are meant, or they cannot be drawn; says why.
        """
        if self.of_all is not None:
            return self.of_all(groups, canvas)
        if len(groups) > 1:
            there = "; ".join(group.title for group in groups)
            raise InvalidInput(f"This figure shows one of: {there}. Name one with --datasets and --protocols.")
        assert self.of_one is not None
        return self.of_one(groups[0], canvas)


FIGURES = {
    "roc": Figure(roc),
    "pr": Figure(precision_recall),
    "histograms": Figure(histograms),
    "bars": Figure(bars),
    "losses": Figure(losses),
    "speed": Figure(speed),
    "samples": Figure(samples),
    "epochs": Figure(of_all=epochs),
    "critical-difference": Figure(of_all=critical_difference),
}


def figure_kind(name: str) -> Figure:
    """The figure of that name.

    Raises:
        InvalidInput: There is none.
    """
    check_known("figure", name, FIGURES)
    return FIGURES[name]
