"""Tables as CSV, LaTeX and Markdown text, and the files of a results folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from ganomaly_plugin.report.costs import cost_frame, cost_markdown
from ganomaly_plugin.report.frame import runs_frame
from ganomaly_plugin.report.tables import Cell, Table, make_tables
from ganomaly_plugin.store import Store, atomic_write

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "±": r"$\pm$",
}


def latex_escape(text: str) -> str:
    """`text` as LaTeX prints it, with any character that pdflatex's default set-up lacks replaced by `?`."""
    return "".join(_LATEX.get(char, char if char.isascii() and char.isprintable() else "?") for char in text)


def markdown_escape(text: str) -> str:
    """`text` safe inside a Markdown table cell."""
    plain = "".join(char if char.isprintable() else "?" for char in text)
    for char in "\\|*_<>`[]":
        plain = plain.replace(char, f"\\{char}")
    return plain


def spreadsheet_safe(value: object) -> object:
    """Text that a spreadsheet would take for a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def cell_text(cell: Cell, plus_minus: str = "±") -> str:
    """`0.912 ± 0.010`, with `(2/3)` behind it when seeds are missing and `–` when all are."""
    if cell.n == 0:
        return "–"
    text = f"{cell.mean:.3f}" + ("" if math.isnan(cell.std) else f" {plus_minus} {cell.std:.3f}")
    return text if cell.n == cell.wanted else f"{text} ({cell.n}/{cell.wanted})"


def caption(table: Table) -> str:
    """One line that says what the table holds."""
    seeds = "1 seed" if table.seeds == 1 else f"mean ± std over n = {table.seeds} seeds"
    return f"{table.dataset}, {table.protocol}: {table.title}; {seeds}"


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables as Markdown: the best of a column bold, the second underlined."""
    blocks = []
    for table in tables:
        ranks = {column: table.ranks(column) for column in table.columns}
        head = ["detector", *(markdown_escape(column) for column in table.columns)]
        lines = [f"**{markdown_escape(caption(table))}**", "", _md_row(head), _md_row(["---"] * len(head))]
        for row in table.rows:
            cells = [_mark(cell_text(table.cells[row][c]), row, ranks[c], "**{}**", "<u>{}</u>") for c in table.columns]
            lines.append(_md_row([markdown_escape(row), *cells]))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def to_text(tables: Sequence[Table]) -> str:
    """All tables in aligned columns for a terminal: `*` behind the best of a column, `'` behind the second."""
    blocks = []
    for table in tables:
        ranks = {column: table.ranks(column) for column in table.columns}
        grid = [["detector", *table.columns]]
        for row in table.rows:
            marked = [_mark(cell_text(table.cells[row][c]), row, ranks[c], "{}*", "{}'") for c in table.columns]
            grid.append([row, *marked])
        safe = [["".join(ch if ch.isprintable() else "?" for ch in text) for text in line] for line in grid]
        widths = [max(len(line[k]) for line in safe) for k in range(len(safe[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in safe]
        rule = "-" * max(len(line) for line in lines)
        blocks.append("\n".join([caption(table), lines[0], rule, *lines[1:]]) + "\n")
    return "\n".join(blocks)


def to_latex(tables: Sequence[Table]) -> str:
    r"""All tables as booktabs `table` environments, to `\input` in a paper; needs booktabs and graphicx."""
    blocks = ["% \\usepackage{booktabs,graphicx}"]
    for table in tables:
        ranks = {column: table.ranks(column) for column in table.columns}
        lines = [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{latex_escape(caption(table))}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(["detector", *map(latex_escape, table.columns)]) + r" \\",
            r"\midrule",
        ]
        for row in table.rows:
            cells = [_latex_cell(table.cells[row][c], row, ranks[c]) for c in table.columns]
            lines.append(" & ".join([latex_escape(row), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one CSV: for each column its mean, `_std` and `_n`; data set, protocol and metric in front."""
    rows = []
    for table in tables:
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
                line |= {column: cell.mean, f"{column}_std": cell.std, f"{column}_n": cell.n}
            rows.append({key: spreadsheet_safe(value) for key, value in line.items()})
    return _csv(pd.DataFrame(rows))


def _csv(frame: pd.DataFrame) -> str:
    return "" if frame.empty else frame.to_csv(index=False, lineterminator="\n")


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mark(text: str, row: str, ranks: tuple[set[str], set[str]], best: str, second: str) -> str:
    if row in ranks[0]:
        return best.format(text)
    return second.format(text) if row in ranks[1] else text


def _latex_cell(cell: Cell, row: str, ranks: tuple[set[str], set[str]]) -> str:
    if cell.n == 0:
        return "--"
    return _mark(cell_text(cell, r"$\pm$"), row, ranks, r"\textbf{{{}}}", r"\underline{{{}}}")


WRITERS: dict[str, Callable[[Sequence[Table]], str]] = {
    "text": to_text,
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
}


def write_tables(store: Store, metrics: Sequence[str] = ("auroc", "auprc")) -> list[Table]:
    """Write `runs.csv`, `auc.csv`, `auc.tex`, `auc.md` and `cost.md` from the records of `store`; return the tables."""
    frame = runs_frame(store.records())
    tables = make_tables(frame, metrics)
    safe = frame.map(spreadsheet_safe) if not frame.empty else frame
    atomic_write(store.folder / "runs.csv", _csv(safe).encode())
    atomic_write(store.folder / "cost.md", cost_markdown(cost_frame(frame)).encode())
    for name, write in (("auc.csv", to_csv), ("auc.tex", to_latex), ("auc.md", to_markdown)):
        atomic_write(store.folder / name, write(tables).encode())
    return tables
