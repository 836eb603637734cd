"""Tables as CSV, LaTeX, Markdown and JSON text, and the files of a results folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
from rich.cells import cell_len, set_cell_size

from ganomaly_plugin.errors import CannotStore
from ganomaly_plugin.escape import latex_escape, markdown_escape, markdown_row, printable, spreadsheet_safe
from ganomaly_plugin.files import atomic_write
from ganomaly_plugin.report.costs import cost_frame, cost_markdown
from ganomaly_plugin.report.frame import MEAN, runs_frame
from ganomaly_plugin.report.tables import Cell, Reference, Table, make_tables, summarise
from ganomaly_plugin.store import Store


def cell_text(cell: Cell, plus_minus: str = "±") -> str:
    """`0.912 ± 0.010`, with `(2/3)` behind it when seeds are missing and `–` when all are."""
    if cell.n == 0:
        return "–"
    text = f"{cell.mean:.3f}" + ("" if math.isnan(cell.std) else f" {plus_minus} {cell.std:.3f}")
    return text if cell.n == cell.wanted else f"{text} ({cell.n}/{cell.wanted})"


def caption(table: Table) -> str:
    """One line that says what the table holds."""
    least = min((cell.wanted for row in table.cells.values() for cell in row.values()), default=0)
    n = f"{least} to {table.seeds}" if least < table.seeds else str(table.seeds)
    seeds = "1 seed" if n == "1" else f"mean ± std over n = {n} seeds"
    return f"{table.dataset}, {table.protocol}: {table.title}; {seeds}"


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables as Markdown: the best of a column bold, the second underlined."""
    blocks = []
    for table in tables:
        ranks = {column: table.ranks(column) for column in table.columns}
        average = table.average_ranks()
        head = ["detector", *(markdown_escape(column) for column in table.columns), *([RANK] if average else [])]
        lines = [f"**{markdown_escape(caption(table))}**", "", markdown_row(head), markdown_row(["---"] * len(head))]
        for row in table.rows:
            cells = [_mark(cell_text(table.cells[row][c]), row, ranks[c], "**{}**", "<u>{}</u>") for c in table.columns]
            lines.append(markdown_row([markdown_escape(row), *cells, *rank_cell(average, row)]))
        for reference in table.references:
            cells = [f"*{text}*" for text in reference_cells(table, reference)]
            lines.append(markdown_row([f"*{markdown_escape(reference.label)}*", *cells, *([""] if average else [])]))
        lines += ["", *(f"- {markdown_escape(note)}" for note in notes(table))] if table.references else []
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def to_text(tables: Sequence[Table]) -> str:
    """All tables in aligned columns for a terminal: `*` behind the best of a column, `'` behind the second."""
    blocks = []
    for table in tables:
        ranks = {column: table.ranks(column) for column in table.columns}
        average = table.average_ranks()
        grid = [["detector", *table.columns, *([RANK] if average else [])]]
        for row in table.rows:
            marked = [_mark(cell_text(table.cells[row][c]), row, ranks[c], "{}*", "{}'") for c in table.columns]
            grid.append([row, *marked, *rank_cell(average, row)])
        padding = [""] if average else []
        grid += [[reference.label, *reference_cells(table, reference), *padding] for reference in table.references]
        safe = [[printable(text) for text in line] for line in grid]
        widths = [max(cell_len(line[k]) for line in safe) for k in range(len(safe[0]))]
        lines = [
            "  ".join(set_cell_size(text, width) for text, width in zip(line, widths, strict=True)).rstrip() for line in safe
        ]
        rule = "-" * max(cell_len(line) for line in lines)
        own = 1 + len(table.rows)
        below = [rule, *lines[own:], *map(printable, notes(table))] if table.references else []
        blocks.append("\n".join([printable(caption(table)), lines[0], rule, *lines[1:own], *below]) + "\n")
    return "\n".join(blocks)


def to_latex(tables: Sequence[Table]) -> str:
    r"""All tables as booktabs `table` environments, to `\input` in a paper; needs booktabs and graphicx.

    A table with more rows or columns than a page has room for becomes several, all but the first of them "continued".
    """
    blocks = ["% \\usepackage{booktabs,graphicx}"]
    for table in tables:
        stacked = len(table.columns) > STACKED_FROM and table.seeds > 1
        room = LATEX_ROWS // 2 if stacked else LATEX_ROWS
        words = [caption(table), *notes(table)]
        for columns in _parts(table.columns, LATEX_COLUMNS):
            average = table.average_ranks() if columns[-1] == table.columns[-1] else {}
            rows = [*_latex_rows(table, columns, average, stacked=stacked), *_latex_references(table, columns, average)]
            for first in range(0, max(len(rows), 1), room):
                lines = [
                    r"\begin{table}[htbp]",
                    r"\centering",
                    rf"\caption{{{latex_escape('. '.join(words))}}}",
                    r"\setlength{\tabcolsep}{4pt}",
                    r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",  # smaller if need be, never larger
                    rf"\begin{{tabular}}{{l{'c' * (len(columns) + bool(average))}}}",
                    r"\toprule",
                    " & ".join(["detector", *map(latex_escape, columns), *([RANK] if average else [])]) + r" \\",
                    r"\midrule",
                    *rows[first : first + room],
                    r"\bottomrule",
                    r"\end{tabular}}",
                    r"\end{table}",
                ]
                blocks.append("\n".join(lines) + "\n")
                words = [caption(table) + ", continued"]
    return "\n".join(blocks)


def _parts(columns: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """`columns` in parts of about equal size, none larger than `most`."""
    size = math.ceil(len(columns) / math.ceil(len(columns) / most))
    yield from (columns[first : first + size] for first in range(0, len(columns), size))


def _latex_rows(table: Table, columns: Sequence[str], average: dict[str, float], *, stacked: bool) -> Iterator[str]:
    """Each row of these `columns`: one line, or two where many classes leave no room for the deviation beside the mean."""
    ranks = {column: table.ranks(column) for column in columns}
    for row in table.rows:
        mine = {column: table.cells[row][column] for column in columns}
        texts = [_latex_cell(cell, row, ranks[column], alone=stacked) for column, cell in mine.items()]
        line = " & ".join([latex_escape(row), *texts, *rank_cell(average, row)])
        if not stacked:
            yield line + r" \\"
            continue
        spreads = [cell_text(cell, r"$\pm$").partition(r" $\pm$ ") for cell in mine.values()]
        small = [rf"{{\scriptsize $\pm$ {rest}}}" if plus_minus else "" for _, plus_minus, rest in spreads]
        yield line + r" \\[-2pt]" + "\n" + " & ".join(["", *small, *([""] if average else [])]) + r" \\[2pt]"


def _latex_references(table: Table, columns: Sequence[str], average: dict[str, float]) -> Iterator[str]:
    """The rows of the literature, a rule above the first."""
    for k, reference in enumerate(table.references):
        texts = dict(zip(table.columns, reference_cells(table, reference), strict=True))
        cells = [texts[column].replace("–", "--") for column in columns]
        label = rf"\textit{{{latex_escape(reference.label)}}}"
        rule = "" if k else "\\midrule\n"
        yield rule + " & ".join([label, *cells, *([""] if average else [])]) + r" \\"


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one CSV: for each column its mean, `_std` and `_n`; data set, protocol and metric in front.

    A class whose name is that of another column, such as "detector", has "class " before it.
    """
    names = _csv_names(tables)
    rows = []
    for table in tables:
        average = table.average_ranks()
        for row in table.rows:
            line: dict[str, object] = {
                "dataset": table.dataset,
                "protocol": table.protocol,
                "metric": table.metric,
                "detector": row,
                "seeds": table.seeds,
            }
            for column in table.columns:
                cell = table.cells[row][column]
                name = names[column]
                line |= {name: cell.mean, f"{name}_std": cell.std, f"{name}_n": cell.n}
            rows.append({**line, "average_rank": average.get(row, math.nan)})
        for reference in table.references:
            line = {"dataset": table.dataset, "protocol": table.protocol, "metric": table.metric, "detector": reference.label}
            line |= {names[column]: value for column, value in reference_values(table, reference).items()}
            rows.append({**line, "source": reference.source, "reliability": reference.reliability})
    frame = pd.DataFrame(rows)
    counts = {"seeds", *(f"{name}_n" for name in names.values())} & set(frame)
    return _csv(frame.astype(dict.fromkeys(counts, "Int64")))  # a published row has none


def _csv_names(tables: Sequence[Table]) -> dict[str, str]:
    """What each column of the tables is called in a CSV, where no two may share a name."""
    taken = {"dataset", "protocol", "metric", "detector", "seeds", "average_rank", "source", "reliability"}
    names: dict[str, str] = {}
    columns = {column for table in tables for column in table.columns}
    for column in sorted(columns, key=lambda column: (column != MEAN, column)):
        name = column
        while taken & {name, f"{name}_std", f"{name}_n"}:
            name = f"class {name}"
        taken |= {name, f"{name}_std", f"{name}_n"}
        names[column] = name
    return names


def to_json(tables: Sequence[Table]) -> str:
    """All tables as a JSON list: cells with mean, std (null for one seed), n and wanted; ranks; the literature apart."""
    content = []
    for table in tables:
        average = table.average_ranks()
        rows = [
            {
                "detector": row,
                "average_rank": average.get(row),
                "cells": {c: _plain(table.cells[row][c]) for c in table.columns},
            }
            for row in table.rows
        ]
        published = [
            {
                "label": reference.label,
                "values": reference_values(table, reference),
                "source": reference.source,
                "reliability": reference.reliability,
            }
            for reference in table.references
        ]
        head = {"dataset": table.dataset, "protocol": table.protocol, "metric": table.metric, "title": table.title}
        more = {"higher_is_better": table.higher_is_better, "seeds": table.seeds, "columns": list(table.columns)}
        content.append({**head, **more, "rows": rows, "published": published})
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text) + "\n"


def _plain(cell: Cell) -> dict[str, float | int | None]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {"mean": number(cell.mean), "std": number(cell.std), "n": cell.n, "wanted": cell.wanted}


def rank_cell(average: dict[str, float], row: str) -> list[str]:
    """The row's cell of the rank column: none when nobody competes, "–" for a row that does not."""
    return ([f"{average[row]:.2f}"] if row in average else ["–"]) if average else []


def reference_values(table: Table, reference: Reference) -> dict[str, float]:
    """The reference's number for each column it has one for; the mean only when it has every class."""
    values = {column: reference.values[column] for column in table.columns if column in reference.values}
    if MEAN in table.columns and table.classes and all(column in values for column in table.classes):
        values[MEAN] = sum(values[column] for column in table.classes) / len(table.classes)
    return values


def reference_cells(table: Table, reference: Reference) -> list[str]:
    """The reference's numbers as texts, a dash where it has none."""
    values = reference_values(table, reference)
    return [f"{values[column]:.3f}" if column in values else "–" for column in table.columns]


def notes(table: Table) -> list[str]:
    """What a reader must know of the rows from the literature."""
    if not table.references:
        return []
    lines = [f"{r.label}: {r.source}; {r.reliability}" for r in table.references]
    return [*lines, "Published rows are quoted, not measured here, and take no part in ranks"]


def _csv(frame: pd.DataFrame) -> str:
    """The frame as CSV that can be printed, none of whose cells a spreadsheet takes for a formula."""
    if frame.empty:
        return ""
    text = frame.select_dtypes(exclude=["number", "bool"]).columns
    unsafe = [name for name in text if any(spreadsheet_safe(value) is not value for value in frame[name].unique())]
    safe = frame.assign(**{name: frame[name].map(spreadsheet_safe) for name in unsafe})
    lines = safe.rename(columns=lambda name: str(spreadsheet_safe(str(name)))).to_csv(index=False, lineterminator="\n")
    return "\n".join(map(printable, lines.split("\n")))


def _mark(text: str, row: str, ranks: tuple[set[str], set[str]], best: str, second: str) -> str:
    if row in ranks[0]:
        return best.format(text)
    return second.format(text) if row in ranks[1] else text


def _latex_cell(cell: Cell, row: str, ranks: tuple[set[str], set[str]], *, alone: bool) -> str:
    if cell.n == 0:
        return "--"
    text = cell_text(cell, r"$\pm$")
    return _mark(text.partition(r" $\pm$ ")[0] if alone else text, row, ranks, r"\textbf{{{}}}", r"\underline{{{}}}")


STACKED_FROM = 6  # columns; wider tables have the deviation below the mean
LATEX_ROWS = 40  # lines, what a page has room for below a caption
LATEX_COLUMNS = 12  # what it has room for side by side, in print that can be read
RANK = "rank"
PLAIN_METRICS = ("auroc", "auprc")  # of the table files

WRITERS: dict[str, Callable[[Sequence[Table]], str]] = {
    "text": to_text,
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
    "json": to_json,
}


def tables_of(frame: pd.DataFrame) -> list[Table]:
    """The tables of PLAIN_METRICS from `runs_frame`, and a summary over data sets where there are several."""
    tables = make_tables(frame, PLAIN_METRICS)
    return tables + summarise(tables)


def write_tables(store: Store, frame: pd.DataFrame | None = None, tables: Sequence[Table] | None = None) -> None:
    """Write `runs.csv`, `auc.csv`, `auc.tex`, `auc.md` and `cost.md` from the records of `store`.

    Args:
        store: The results folder.
        frame: `runs_frame` of its records, where they have been read before.
        tables: `tables_of` that frame, where they have been made before.

    Raises:
        CannotStore: The folder cannot be written.
    """
    frame = runs_frame(store.records()) if frame is None else frame
    tables = tables_of(frame) if tables is None else tables
    files = {"runs.csv": _csv(frame), "cost.md": cost_markdown(cost_frame(frame))}
    files |= {"auc.csv": to_csv(tables), "auc.tex": to_latex(tables), "auc.md": to_markdown(tables)}
    try:
        for name, text in files.items():
            atomic_write(store.folder / name, text.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotStore(f"Cannot write tables to {store.folder}: {reason}. The records are kept; mend that.") from error
