"""What `bench tables`, `bench stats`, `bench plot` and `bench report` do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import CannotStore, InvalidInput, check_known
from ganomaly_plugin.escape import printable
from ganomaly_plugin.files import as_path
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.report.measures import METRICS, check_fpr, check_metrics, measured_frame
from ganomaly_plugin.report.named_scores import by_score
from ganomaly_plugin.report.published import against_published, left_alone
from ganomaly_plugin.report.results import Results
from ganomaly_plugin.report.tables import Table, leaks, make_tables, summarise
from ganomaly_plugin.report.writers import PLAIN_METRICS, WRITERS, write_tables
from ganomaly_plugin.store import Store
from ganomaly_plugin.streams import print_file


def finished(store: Store) -> list[RunRecord]:
    """The records of `store`.

    Raises:
        InvalidInput: No job is done.
    """
    records = store.records()
    if any(record.status == "done" for record in records):
        return records
    failed = f"; the first failure: {records[0].job.slug}: {records[0].error}" if records else ""
    todo = "the same bench run with --retry-failed" if records else f"bench run --out {shlex.quote(str(store.folder))}"
    raise InvalidInput(f"{store.folder} has no finished job ({len(records)} records{failed}). Run {todo}.")


def tables(options: Any) -> int:
    """Print the tables, or the classification reports, of a results folder, and write its table files again."""
    check_known("format", options.format, WRITERS)
    if options.against not in (None, "published"):
        raise InvalidInput(f"against must be published, got {options.against!r}.")
    check_fpr(options.fpr)
    store = Store(options.results)
    records = everything = finished(store)
    if options.report:
        if options.scores:
            raise InvalidInput("--report is of each detector's own score. Leave out --scores, or run name[score_by=...].")
        if options.format != "text":
            raise InvalidInput(f"--report prints text only. Leave out --format {options.format}.")
        if options.against:
            raise InvalidInput(f"--report has nothing to show beside it. Leave out --against {options.against}, or --report.")
        if tuple(options.metrics) != PLAIN_METRICS:
            metrics = ",".join(options.metrics)
            raise InvalidInput(f"--report has measures of its own. Leave out --metrics {metrics}, or --report.")
        from ganomaly_plugin.report.decisions import decision_reports  # scikit-learn takes a second, and tables do without

        print(decision_reports(store, records, options.fpr, per_class=options.per_class), end="")
        return 0
    if options.per_class:
        raise InvalidInput("--per-class is of --report: a table has its classes anyway. Add --report.")
    if options.scores:
        records, remarks = by_score(store, records, options.scores, options.metrics, options.fpr)
        tell(remarks)
    frame = runs_frame(everything)
    shown = measured_frame(store, records, options.metrics, options.fpr, frame if records is everything else None)
    made = make_tables(shown, options.metrics, fpr=options.fpr)
    plain = [*made, *summarise(made)] if records is everything and tuple(options.metrics) == PLAIN_METRICS else None
    made, lacking = measured(made)
    tell([*lacking, *leaks(frame)])
    made += summarise(made)
    if options.against:
        made = against_published(made)
        tell(left_alone(made))
    try:
        write_tables(store, frame, plain)  # first: whoever reads what follows may go away
    except CannotStore as error:  # results on a read-only disk can be looked at all the same
        print(f"bench: {error}", file=sys.stderr)
    text = WRITERS[options.format](made)
    if options.format == "text":
        print(text, end="")
    else:
        print_file(text)
    return 0


def tell(lines: Iterable[str]) -> None:
    """Remarks for people, on stderr."""
    for line in lines:
        print(printable(line), file=sys.stderr)


def measured(made: Sequence[Table]) -> tuple[list[Table], list[str]]:
    """The tables `made` without those of a measure that no job took, and a line for each of these.

    Raises:
        InvalidInput: None is left.
    """
    empty = [table for table in made if METRICS[table.metric].measure is None and not table.rows]
    why = "it is taken while a job runs, from anomaly maps and the data set's masks, or after each epoch under paper-v1"
    if len(empty) == len(made):
        raise InvalidInput(f"No job has {', '.join(dict.fromkeys(table.metric for table in made))}: {why}.")
    lines = [f"{table.dataset}, {table.protocol}: no job has {table.metric}; {why}" for table in empty]
    return [table for table in made if table not in empty], lines


def stats(options: Any) -> int:
    """Print intervals and tests of a results folder: what its numbers allow to say, and why not where they do not."""
    from ganomaly_plugin.report.comparisons import comparison_text, comparisons, friedman_text, left_out, over_data_sets

    results = Results(options.results)
    finished(results.store)
    check_metrics([options.metric])
    made = [table for table in results.tables((options.metric,)) if table.metric == options.metric]  # not those beside AUROC
    shown, lacking = measured(made)
    tell([*lacking, *left_out(shown, options.baseline)])
    for comparison in comparisons(results, shown, baseline=options.baseline):
        print(comparison_text(comparison))
    for protocol, tested, why in over_data_sets(shown):
        print(friedman_text(protocol, tested, why))
    return 0


def plot(options: Any) -> int:
    """Draw one figure of a results folder to a file; its caption, and its numbers where it has a table, go to stdout."""
    from ganomaly_plugin.report.figures import figure_kind
    from ganomaly_plugin.report.figures.style import PAPER, Canvas, check_target, save, styled
    from ganomaly_plugin.report.groups import groups

    kind, out = figure_kind(options.kind), as_path(options.out)
    check_target(out)
    if not 1 <= options.width <= 30:
        raise InvalidInput(f"width must lie between 1 and 30 inches, got {options.width:g}.")
    results = Results(options.results)
    finished(results.store)
    filters = {name: getattr(options, name) for name in ("detectors", "classes", "datasets", "protocols")}
    with styled(PAPER):
        drawing = kind.draw(groups(results, **filters), Canvas(options.width))
        save(drawing.figure, out)
    print(printable(drawing.caption), *([drawing.table] if drawing.table else []), sep="\n\n")
    print(f"figure in {out}", file=sys.stderr)
    return 0


def report(options: Any) -> int:
    """Make the HTML page of a results folder."""
    from ganomaly_plugin.report.html import write_report

    results = Results(options.results)
    out = as_path(options.out) if options.out else results.store.folder / "report.html"
    size = write_report(results, out)
    print(f"report in {out} ({size / 1e6:.1f} MB)")
    return 0
