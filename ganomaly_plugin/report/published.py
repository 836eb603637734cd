"""The literature's numbers, as data with their source and reliability, beside tables of the same protocol only."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources

import pandas as pd

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.tables import ALL, Reference, Table

_COMPARED = ("auroc", "auroc_oracle")  # what the literature reports; it seldom says which of the two


@functools.cache
def published_frame() -> pd.DataFrame:
    """One row a published number: method, dataset, class, protocol, image_size, epoch, auroc, source, reliability."""
    text = resources.files("ganomaly_plugin.report").joinpath("published.csv")
    with text.open(encoding="utf-8") as file:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    return frame.assign(auroc=frame["auroc"].astype(float))


def against_published(tables: Sequence[Table]) -> list[Table]:
    """`tables` with the published AUROCs of the same data set, protocol and classes as `references`.

    Raises:
        InvalidInput: No table may stand beside published numbers; says what differs.
    """
    joined = [replace(table, references=_references(table)) for table in tables]
    if not any(table.references for table in joined):
        raise InvalidInput(_why_not(tables))
    return joined


def left_alone(tables: Sequence[Table]) -> list[str]:
    """One line for each of `tables` whose data set has published numbers, but of another protocol."""
    known = published_frame()
    lines = []
    for table in tables:
        theirs = sorted(known[known["dataset"] == table.where[0]]["protocol"].unique())
        if table.metric in _COMPARED and theirs and table.protocol not in theirs:
            lines.append(
                f"{table.dataset}, {table.protocol}: published numbers are of {', '.join(theirs)} and are not put beside these"
            )
    return list(dict.fromkeys(lines))


def _references(table: Table) -> tuple[Reference, ...]:
    dataset, data, sampling = table.where
    known = published_frame()
    if table.metric not in _COMPARED or json.loads(sampling):
        return ()
    rows = known[(known["dataset"] == dataset) & (known["protocol"] == table.protocol) & known["class"].isin(table.columns)]
    size = str(json.loads(data).get("image_size"))
    found = []
    for method, group in rows.groupby("method", sort=False):
        first = group.iloc[0]
        sizes = "" if first["image_size"] in ("", size) else f", at {first['image_size']} pixels"
        found.append(
            Reference(
                label=f"{method} (published)",
                values={str(name): float(value) for name, value in zip(group["class"], group["auroc"], strict=True)},
                source=f"{first['source']}{sizes}, epoch: {first['epoch']}",
                reliability=str(first["reliability"]),
            )
        )
    return tuple(found)


def _why_not(tables: Sequence[Table]) -> str:
    known = published_frame()
    about = [table for table in tables if table.dataset != ALL]
    if about and not any(table.metric in _COMPARED for table in about):
        return f"Published numbers are AUROCs, got {', '.join(sorted({table.metric for table in about}))}. Add --metrics auroc."
    same = [table for table in about if table.where[0] in set(known["dataset"])]
    if not same:
        here = ", ".join(sorted({table.where[0] for table in about})) or "(none)"
        return (
            f"No published numbers for the data sets here: {here}. There are some for: {', '.join(known['dataset'].unique())}."
        )
    dataset = same[0].where[0]
    theirs = sorted(known[known["dataset"] == dataset]["protocol"].unique())
    ours = sorted({table.protocol for table in same if table.where[0] == dataset})
    if not set(theirs) & set(ours):
        return (
            f"The published numbers for {dataset} are of protocol {', '.join(theirs)}, these results of {', '.join(ours)}: "
            f"they do not compare. Run with --protocols {theirs[0]}."
        )
    if any(json.loads(table.where[2]) for table in same):
        return f"These results on {dataset} are of part of the data or contaminated ({same[0].dataset}), published ones not."
    return f"No published numbers for these classes of {dataset}: {', '.join(same[0].classes)}."
