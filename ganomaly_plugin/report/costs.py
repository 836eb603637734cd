"""What each detector costs: parameters, training steps, seconds to fit and to score, from the records."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ganomaly_plugin.escape import markdown_escape, markdown_row
from ganomaly_plugin.report.frame import GROUP
from ganomaly_plugin.report.tables import describe_data

COLUMNS = [
    "dataset",
    "protocol",
    "detector",
    "jobs",
    "train_images",
    "steps",
    "images_seen",
    "parameters",
    "fit_s",
    "score_ms_per_image",
]


def cost_frame(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a detector of each data set, with its options, and protocol: medians over its finished jobs.

    The seconds are those of the machines that the jobs ran on, busy or not; `bench speed` measures side by side.

    Args:
        runs: `runs_frame`'s rows.
    """
    if runs.empty or not (runs["status"] == "done").any():
        return pd.DataFrame(columns=COLUMNS)
    done = runs[runs["status"] == "done"]

    def column(name: str) -> pd.Series:
        return pd.to_numeric(done[name], errors="coerce") if name in done else pd.Series(float("nan"), index=done.index)

    tested = column("counts.test_normal") + column("counts.test_anomalous")
    measured = {
        "jobs": pd.Series(1, index=done.index),
        "train_images": column("counts.train"),
        "steps": column("notes.describe.steps"),
        "images_seen": column("notes.describe.images_seen").fillna(  # older records: steps times the batch
            column("notes.describe.steps") * np.minimum(column("hparams.batch_size"), column("counts.train"))
        ),
        "parameters": column("notes.describe.parameters"),
        "fit_s": column("seconds.fit"),
        "score_ms_per_image": 1000 * column("seconds.score") / tested,
    }
    done = done[[*GROUP, "detector"]].assign(**measured)
    grouped = done.groupby([*GROUP, "detector"], sort=True)
    medians = grouped.agg({name: "sum" if name == "jobs" else "median" for name in measured}).reset_index()
    where = zip(medians["dataset"], medians["data"], medians["sampling"], strict=True)
    return medians.assign(dataset=[describe_data(*map(str, each)) for each in where])[COLUMNS]


def cost_markdown(costs: pd.DataFrame) -> str:
    """The costs as a Markdown table; what a detector does not tell is left empty."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [[markdown_escape(cost_text(value)) for value in row] for row in costs.itertuples(index=False)]
    return "".join(f"{markdown_row(row)}\n" for row in rows)


def cost_text(value: object) -> str:
    """A name as it is; a number short, empty where it is unknown."""
    if isinstance(value, str):
        return value
    number = float(value)  # type: ignore[arg-type]
    if pd.isna(number):
        return ""
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
