"""The live view of a sweep on a terminal: cells as they fill up, and how far running jobs are."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape as escape_markup
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ganomaly_plugin.core import Job, RunRecord, canonical_json
from ganomaly_plugin.escape import clip, printable
from ganomaly_plugin.estimate import clock, expected_seconds, job_left, kind_of, sweep_left
from ganomaly_plugin.progress import Follower, describe
from ganomaly_plugin.report.frame import split_category
from ganomaly_plugin.report.tables import describe_data
from ganomaly_plugin.status import Board, Status

if TYPE_CHECKING:
    from ganomaly_plugin.runner import Plan

MOST_RUNNING = 8  # rows of running jobs
_FIRST_LOSSES = ("generator", "discriminator")  # what a GAN's user looks at first
_WAITING, _RUNNING, _FAILED = "·", "▶", "✗"

#: A table's jobs, by slug, in its cells: row → class → slugs; and its classes in order.
Cells = tuple[dict[str, dict[str, list[str]]], list[str]]


@contextlib.contextmanager
def live(plan: Plan, folder: Path) -> Iterator[LiveView]:
    """Show `plan` on stderr until the end of the block; running jobs write below `folder`."""
    console = Console(file=sys.stderr)
    with Board(folder) as board:
        view = LiveView(plan, board, console)
        with Live(get_renderable=view.render, console=console, refresh_per_second=2, vertical_overflow="crop"):
            yield view


class LiveView(Follower):
    """What is known of a sweep's jobs, and its picture.

    Args:
        plan: The sweep.
        board: Tells of running jobs.
        console: Where the picture shall fit.
    """

    def __init__(self, plan: Plan, board: Board, console: Console) -> None:
        self.jobs = {job.slug: job for job in plan.jobs}
        self.records = {record.job.slug: record for record in [*plan.done, *plan.failed]}
        self.took: list[tuple[Job, float]] = []  # in this sweep: what was done before may be of another machine
        self.board, self.console = board, console
        self.began = time.time()
        self.workers = 1
        self.groups = _groups(self.jobs)

    def add(self, record: RunRecord) -> None:
        """Take `record` into the picture; a failure also becomes a line above it."""
        self.records = {**self.records, record.job.slug: record}
        if record.status == "failed":
            self.console.print(f"[red]{escape(describe(record))}[/red]", highlight=False, soft_wrap=True)
        else:
            self.took = [*self.took, (record.job, sum(record.seconds.values()))]

    def render(self) -> RenderableType:
        """The picture as it is now; called from a thread of its own."""
        records, took = self.records, self.took
        running = {s: status for s, status in self.board.read(self.jobs).items() if s not in records}
        self.workers = max(self.workers, len(running))
        return self.picture(records, running, took, time.time())

    def picture(
        self, records: dict[str, RunRecord], running: dict[str, Status], took: list[tuple[Job, float]], now: float
    ) -> RenderableType:
        """The picture of a given moment: a heading, the cells, the running jobs."""
        height = self.console.height - 2
        lines = min(len(running), MOST_RUNNING, max(1, height // 3))
        below = self._running(running, lines, took, now) if running else []
        room = height - 2 - (lines + 2 if running else 0)
        return Group(self._heading(records, running, took, now), *self._cells(records, running, room), *below)

    def _heading(
        self, records: dict[str, RunRecord], running: dict[str, Status], took: list[tuple[Job, float]], now: float
    ) -> RenderableType:
        failed = sum(record.status == "failed" for record in records.values())
        waiting = [job for slug, job in self.jobs.items() if slug not in records and slug not in running]
        at_work = [(self.jobs[slug], status) for slug, status in running.items()]
        left = sweep_left(waiting, at_work, took, self.workers, now) if waiting or at_work else 0.0
        words = [f"{len(records)}/{len(self.jobs)} jobs"]
        words += [f"{len(running)} running"] if running else []
        words += [f"[red]{failed} failed[/red]"] if failed else []
        words += [f"{clock(now - self.began)} so far", f"{clock(left)} left"]
        bar = ProgressBar(total=len(self.jobs), completed=len(records), width=max(10, min(40, self.console.width // 4)))
        row = Table.grid(padding=(0, 2))
        row.add_row(bar, Text.from_markup("  ".join(words)))
        return row

    def _cells(self, records: dict[str, RunRecord], running: dict[str, Status], room: int) -> Sequence[RenderableType]:
        """The first of several forms that fits: values and counts, one of them, or a summary of rows."""
        tall = sum(len(rows) + 2 for rows, _ in self.groups.values())
        if tall <= room:
            unbounded = self.console.options.update(width=10_000)
            for form in ("full", "short"):
                grids = [self._grid(*group, records, running, form) for group in self.groups.values()]
                if all(Measurement.get(self.console, unbounded, grid).maximum <= self.console.width for grid in grids):
                    titles = [Text(title, style="italic", no_wrap=True, overflow="ellipsis") for title in self.groups]
                    return [part for pair in zip(titles, grids, strict=True) for part in pair]
        return self._summary(records, running, room)

    def _grid(
        self,
        rows: dict[str, dict[str, list[str]]],
        classes: list[str],
        records: dict[str, RunRecord],
        running: dict[str, Status],
        form: str,
    ) -> Table:
        grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("AUROC", no_wrap=True, min_width=max(len(row) for row in rows))
        for name in classes:
            grid.add_column(escape(name), no_wrap=True, justify="right", min_width=5)
        for row, cells in rows.items():
            grid.add_row(escape(row), *(self._cell(cells.get(name, []), records, running, form) for name in classes))
        return grid

    def _cell(self, slugs: list[str], records: dict[str, RunRecord], running: dict[str, Status], form: str) -> Text:
        """The mean AUROC of finished seeds, how many they are while some are missing, and marks for the others."""
        there = [records[slug] for slug in slugs if slug in records]
        done = [record.metrics["auroc"] for record in there if record.status == "done"]
        at_work = [running[slug] for slug in slugs if slug in running]
        partial = len(slugs) > 1 and bool(there) and len(done) < len(slugs)
        words = []
        if done and not (partial and form == "short"):
            words.append(f"{statistics.mean(done):.3f}")
        if partial:
            words.append(f"{len(done)}/{len(slugs)}")
        text = Text(" ".join(words))
        if len(done) < len(there):
            text.append(_FAILED, style="red")
        if at_work:
            alone = len(slugs) == 1 and at_work[0].total
            text.append(f"{at_work[0].share:.0%}" if alone else _RUNNING, style="cyan")
        return text or Text(_WAITING, style="dim")

    def _summary(self, records: dict[str, RunRecord], running: dict[str, Status], room: int) -> list[RenderableType]:
        """One row for each detector and data set; those at work first, then those with failures, and so on."""
        groups: dict[tuple[str, str], list[str]] = {}
        for slug, job in self.jobs.items():
            groups.setdefault(kind_of(job), []).append(slug)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("detector", "data set"):
            table.add_column(Text(name, no_wrap=True, overflow="ellipsis"))  # these give way where there is little room
        for name in ("done", "failed", "running", "AUROC"):
            table.add_column(name, no_wrap=True, justify="right")
        rows: list[tuple[tuple[bool, ...], list[RenderableType]]] = []
        for kind, slugs in groups.items():
            there = [records[slug] for slug in slugs if slug in records]
            values = [record.metrics["auroc"] for record in there if record.status == "done"]
            at_work = sum(slug in running for slug in slugs)
            failed = len(there) - len(values)
            urgency = (not at_work, not failed, len(there) == len(slugs))
            mean = f"{statistics.mean(values):.3f}" if values else ""
            shown = (f"{len(values)}/{len(slugs)}", f"[red]{failed}[/red]" if failed else "", str(at_work or ""), mean)
            names = (Text(printable(name), no_wrap=True, overflow="ellipsis") for name in kind)
            rows.append((urgency, [*names, *shown]))
        if len(rows) > max(1, room - 1):
            rows.sort(key=lambda row: row[0])
        for _, row in rows[: max(1, room - 2)] if len(rows) > room - 1 else rows:
            table.add_row(*row)
        hidden = len(rows) - table.row_count
        return [table, _more(f"{hidden} more rows")] if hidden else [table]

    def _running(
        self, running: dict[str, Status], lines: int, took: list[tuple[Job, float]], now: float
    ) -> list[RenderableType]:
        """One row a running job, the oldest first; as many losses as there is room for."""
        known, _ = expected_seconds(took, [(self.jobs[slug], status) for slug, status in running.items()], now)
        units = {status.unit for status in running.values() if status.total}
        rows: list[tuple[str, ...]] = [("running", "/".join(sorted(units)), "images/s", "so far", "left")]
        statuses = sorted(running.items(), key=lambda item: item[1].started)[:lines]
        for slug, status in statuses:
            job = self.jobs[slug]
            where = f" · {job.dataset} · {split_category(job)[1]} · s{job.seed}"
            name = shortened(job.detector_label, self.console.width * 2 // 5 - len(where)) + where
            total = f"{status.done}/{status.total}" if status.total else ""
            rate = f"{status.images_per_second:,.0f}" if status.images_per_second else ""
            left = clock(job_left(status, known.get(kind_of(job)), now))
            rows.append((name, total, rate, clock(now - status.started), left))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[0] = max(8, min(widths[0], self.console.width - sum(widths[1:]) - 2 * len(widths)))
        room = self.console.width - sum(widths) - 2 * (len(widths) + 1)
        losses = ["losses", *(losses_text(status, room) for _, status in statuses)]
        rows = [(clip(name, widths[0]), *figures) for name, *figures in rows]
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, row_styles=["dim", *[""] * len(statuses)])
        for k, width in enumerate(widths):
            table.add_column(width=width, no_wrap=True, overflow="ellipsis", justify="right" if k else "left")
        if any(losses[1:]):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for row, text in zip(rows, losses, strict=True):
            table.add_row(*map(escape, [*row, text] if any(losses[1:]) else row))
        hidden = len(running) - len(statuses)
        return [table, _more(f"{hidden} more")] if hidden else [table]


def _groups(jobs: dict[str, Job]) -> dict[str, Cells]:
    """The jobs as tables will show them, by title."""
    found: dict[str, Cells] = {}
    titles: dict[tuple[str, ...], str] = {}
    for slug, job in jobs.items():
        data, category = split_category(job)
        where = (job.dataset, canonical_json(data), canonical_json(dict(job.sampling)))
        if where not in titles:
            titles[where] = describe_data(*where)
        rows, classes = found.setdefault(f"{titles[where]}, {job.protocol}", ({}, []))
        rows.setdefault(job.detector_label, {}).setdefault(category, []).append(slug)
        if category not in classes:
            classes.append(category)
    return found


def _more(what: str) -> Text:
    """The line below a table that leaves some rows out."""
    return Text(f"… and {what}", style="dim", no_wrap=True, overflow="ellipsis")


def shortened(text: str, length: int) -> str:
    """The first `length` characters of `text` (8 at least), with an ellipsis where some are left out."""
    length = max(8, length)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def losses_text(status: Status, room: int) -> str:
    """The losses of the last epoch that fit into `room` characters, those of a GAN's two players first."""
    first = [name for name in _FIRST_LOSSES if name in status.losses]
    text = ""
    for name in first + [name for name in status.losses if name not in first]:
        longer = f"{text}{'  ' if text else ''}{name} {status.losses[name]:.3g}"
        if len(longer) > room:
            break
        text = longer
    return text


def escape(text: str) -> str:
    """`text` without control characters, and without meaning as rich's markup."""
    return escape_markup(printable(text))
