"""The critical-difference diagram: average ranks over data sets, and which of them Nemenyi's test cannot tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import clip
from ganomaly_plugin.report.comparisons import over_data_sets, p_text, without
from ganomaly_plugin.report.figures.legend import LETTER
from ganomaly_plugin.report.figures.style import Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group, short_names
from ganomaly_plugin.report.statistics import Friedman

MOST = 20  # detectors that one diagram holds
RANK_WIDTH = 0.2  # inches of the axis, at least, from one rank to the next


def critical_difference(groups: Sequence[Group], canvas: Canvas) -> Drawing:
    """The diagram of all groups' data sets, which must be of one protocol.

    Raises:
        InvalidInput: There are too few data sets or detectors for Friedman's test, or several protocols.
    """
    tested = list(over_data_sets([group.table for group in groups]))
    if len(tested) > 1:
        raise InvalidInput(
            f"Results of several protocols have no ranks in common: {', '.join(each[0] for each in tested)}. "
            "Name one with --protocols."
        )
    ((protocol, found, why),) = tested
    if found is None:
        raise InvalidInput(f"No critical-difference diagram: {why}")
    return draw(found, protocol, canvas)


def draw(found: Friedman, protocol: str, canvas: Canvas) -> Drawing:
    """The diagram of a test."""
    try:
        from scikit_posthocs import critical_difference_diagram
    except ImportError as error:
        raise InvalidInput("The diagram is drawn by scikit-posthocs: pip install 'ganomaly-plugin[stats]'.") from error
    from matplotlib.ticker import MultipleLocator

    if len(found.ranks) > MOST:
        raise InvalidInput(f"A diagram of {len(found.ranks)} detectors is not readable. Name up to {MOST} with --detectors.")
    short = short_names(list(found.ranks))
    names = [clip(short[name], 22) for name in found.ranks]
    if len(set(names)) < len(names):
        names = list(found.ranks)
    longest = max(map(len, names)) + len(" (1.00)")
    needed = 2 * longest * LETTER + RANK_WIDTH * (max(found.ranks.values()) - min(found.ranks.values()))
    if needed > canvas.width:
        raise InvalidInput(
            f"The names do not fit beside a diagram of {canvas.width:g} inches. Give --width {math.ceil(needed * 2) / 2:g}, or "
            "fewer --detectors."
        )
    figure = new_figure(canvas.width, 1.0 + 0.17 * len(names))
    axes = figure.subplots()
    axes.grid(visible=False)
    ink = canvas.theme.ink
    critical_difference_diagram(
        dict(zip(names, found.ranks.values(), strict=True)),
        pd.DataFrame(found.p_pairs, names, names),
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        label_props={"fontsize": 7},
        elbow_props={"linewidth": 0.8},
        color_palette=[ink] * len(names),
        marker_props={"s": 10},
        crossbar_props={"color": canvas.theme.colours[0], "linewidth": 2.2},
        text_h_margin=0.05,
    )
    axes.spines["top"].set_visible(True)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    start, end = min(found.ranks.values()), min(found.ranks.values()) + found.critical_difference
    axes.plot([start, end], [1.9, 1.9], color=ink, linewidth=1.2, marker="|", markersize=5)  # above the numbers of the axis
    axes.text((start + end) / 2, 2.1, f"CD = {found.critical_difference:.2f}", ha="center", va="bottom", fontsize=7)
    caption = (
        f"Average ranks over {found.n} data sets, {protocol}, 1 the best; bars join what Nemenyi's test does not tell apart at "
        f"0.05 (critical difference {found.critical_difference:.2f}; Friedman's test: {p_text(found.p)})."
    )
    return Drawing(figure, caption + without(found.left_out))
