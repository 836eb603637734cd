"""`bench report`: a results folder as one HTML page without scripts or network, the same bytes for the same records."""

from __future__ import annotations

import shlex
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ganomaly_plugin import __version__
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import WITHOUT_CONTROL, storable
from ganomaly_plugin.files import atomic_write, check_writable
from ganomaly_plugin.report.comparisons import friedman_text, over_data_sets, p_number
from ganomaly_plugin.report.figures.ranks import critical_difference
from ganomaly_plugin.report.figures.sheets import truth_words
from ganomaly_plugin.report.figures.style import PAGE, Canvas, styled
from ganomaly_plugin.report.groups import Group, class_of, groups
from ganomaly_plugin.report.page import (
    COST_HEAD,
    IMAGE_BYTES,
    MORE,
    WIDE,
    Figure,
    commands,
    failures,
    figure,
    heading,
    machines,
    section,
)
from ganomaly_plugin.report.results import Results, breakable, table_html
from ganomaly_plugin.report.tables import summarise
from ganomaly_plugin.report.writers import notes

_TEMPLATES = "templates"


def report_html(results: Results) -> str:
    """The page.

    Raises:
        InvalidInput: The folder has no record at all.
        CorruptFile: A record or its scores are damaged.
    """
    records = results.records
    if not records:
        raise InvalidInput(
            f"{results.store.folder} has no record yet. Run bench run --out {shlex.quote(str(results.store.folder))}."
        )
    there = groups(results) if any(record.status == "done" for record in records) else []
    tables = results.tables(("auroc", "auprc", *MORE))
    budget = [IMAGE_BYTES]
    with styled(PAGE):
        sections = [section(k, group, tables, budget) for k, group in enumerate(there, 1)]
        across = _across(there)
    main = [table for table in tables if table.metric not in MORE]
    done = sum(record.status == "done" for record in records)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=results.store.folder.resolve().name,
            folder=results.store.folder.as_posix(),
            version=__version__,
            style=_text("report.css"),
            done=done,
            failed=failures(records),
            detectors=sorted({record.job.detector_label for record in records}),
            datasets=sorted({record.job.dataset for record in records}),
            protocols=sorted({record.job.protocol for record in records}),
            seeds=sorted({record.job.seed for record in records}),
            hours=sum(record.seconds.get("fit", 0) + record.seconds.get("score", 0) for record in records) / 3600,
            sections=sections,
            summaries=summarise(main),
            across=across,
            machines=machines(records),
            commands=commands(records),
            cost_head=COST_HEAD,
        )
    )


def _across(there: list[Group]) -> list[tuple[str, Figure | None]]:
    """For each protocol what Friedman's test says over its data sets, with the diagram where there is one."""
    found: list[tuple[str, Figure | None]] = []
    for k, (protocol, tested, why) in enumerate(over_data_sets([group.table for group in there]) if there else ()):
        diagram = None
        if tested is not None:
            mine = [group for group in there if group.protocol == protocol]
            canvas = Canvas(WIDE if len(tested.ranks) > 8 else WIDE / 2, PAGE)
            diagram = figure(f"cd{k}", partial(critical_difference, mine, canvas))
        found.append((friedman_text(protocol, tested, why), diagram))
    return found


def _text(name: str) -> str:
    return resources.files("ganomaly_plugin.report").joinpath(_TEMPLATES, name).read_text(encoding="utf-8")


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=PackageLoader("ganomaly_plugin.report", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["table"] = lambda table: Markup(table_html(table))  # these two escape every text themselves
    made.filters["breakable"] = lambda text: Markup(breakable(text))
    made.filters["sentence"] = lambda text: f"{text.rstrip('.')}."
    made.filters |= {
        "heading": heading,
        "notes": notes,
        "class_of": class_of,
        "truth": truth_words,
        "p": p_number,
    }
    return made


def write_report(results: Results, out: Path) -> int:
    """Write the page to `out` and return its size in bytes; `check_writable` says what `out` must be."""
    check_writable(out)
    content = storable(report_html(results).translate(WITHOUT_CONTROL)).encode()
    atomic_write(out, content)
    return len(content)
