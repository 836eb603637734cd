"""What the HTML report shows, gathered from a results folder; how it looks is in the template."""

from __future__ import annotations

import base64
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.datasets.splits import PROTOCOLS
from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.report.comparisons import Comparison, compare, p_text, seed_means
from ganomaly_plugin.report.costs import COLUMNS, cost_frame, cost_text
from ganomaly_plugin.report.figures.bars import bars
from ganomaly_plugin.report.figures.curves import precision_recall, roc
from ganomaly_plugin.report.figures.epochs import Choice, choices, epochs
from ganomaly_plugin.report.figures.histograms import PANELS, histogram
from ganomaly_plugin.report.figures.losses import losing, loss
from ganomaly_plugin.report.figures.sheets import Sheet, by_class, png, sheets
from ganomaly_plugin.report.figures.speed import speed
from ganomaly_plugin.report.figures.style import PAGE, Canvas, Drawing, inline_svg
from ganomaly_plugin.report.frame import MEAN
from ganomaly_plugin.report.groups import Group
from ganomaly_plugin.report.published import against_published
from ganomaly_plugin.report.tables import Table, leaks
from ganomaly_plugin.report.writers import caption, cell_text

NARROW, WIDE = 3.6, 10.5  # inches; a page scales figures to its width
IMAGE_BYTES = 2_500_000  # of sample images on a page, before base64; with all else that makes less than 5 MB
MORE = ("f1", "fpr95", "eer")  # tables that are folded away


@dataclass(frozen=True)
class Figure:
    """An SVG element, the id of its caption and the caption; or, in place of the SVG, why there is none."""

    id: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Example:
    """Sample images of one job; `sheets` with their PNG as base64."""

    detector: str
    category: str
    seed: int
    sheets: list[tuple[Sheet, str]]


@dataclass
class Section:
    """One data set under one protocol."""

    id: str
    group: Group
    verdict: list[str]
    facts: list[str]
    tables: list[Table] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    comparison: Comparison | None = None
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)  # by detector, the best first
    examples_left: int = 0
    costs: list[list[str]] = field(default_factory=list)


COST_HEAD = [name.replace("_", " ") for name in COLUMNS[2:]]


def section(k: int, group: Group, tables: Iterable[Table], budget: list[int]) -> Section:
    """All there is to show of a group. To be called inside `styled(PAGE)`; `budget` holds the bytes left for images."""
    mine = [table for table in tables if table.where == group.where and table.protocol == group.protocol]
    made = Section(f"g{k}", group, [], _facts(group))
    made.tables = [_with_literature(table) for table in mine if table.metric not in MORE]
    made.more = [table for table in mine if table.metric in MORE]
    means = seed_means(group.results, group.table)
    made.comparison = compare(group.results.store, group.records, group.table, means)
    made.verdict = _verdict(group, made.comparison)

    def draw(name: str, make: Callable[[], Drawing]) -> Figure:
        return figure(f"g{k}-{name}", make)

    made.figures = {
        "bars": [
            draw("bars", lambda: bars(group, Canvas(WIDE, PAGE))),
            draw("bars-tall", lambda: bars(group, Canvas(NARROW, PAGE))),
        ],
        "curves": [
            draw("roc", lambda: roc(group, Canvas(NARROW, PAGE))),
            draw("pr", lambda: precision_recall(group, Canvas(NARROW, PAGE))),
            draw("speed", lambda: speed(group, Canvas(NARROW, PAGE))),
        ],
        "histograms": [
            draw(f"scores{n}", lambda name=name: histogram(group, name, Canvas(NARROW, PAGE)))  # type: ignore[misc]
            for n, name in enumerate(group.detectors[:PANELS])
        ],
        "losses": [
            draw(f"loss{n}", lambda name=name: loss(group, name, Canvas(NARROW, PAGE)))  # type: ignore[misc]
            for n, name in enumerate(losing(group)[:PANELS])
        ],
    }
    made.choices = choices(group)
    if made.choices:
        made.figures["epochs"] = [draw("epochs", lambda: epochs([group], Canvas(NARROW, PAGE)))]
    made.examples, made.examples_left = examples(group, budget)
    made.costs = [[cost_text(row[name]) for name in COLUMNS[2:]] for row in cost_frame(group.runs).to_dict("records")]
    return made


def figure(name: str, make: Callable[[], Drawing]) -> Figure:
    """What `make` draws, or why it cannot; ids on the page begin with `name`. To be called inside `styled(PAGE)`."""
    prefix = f"{name}-"
    try:
        drawing = make()
    except InvalidInput as error:
        return Figure(f"{prefix}text", "", one_line(error))
    return Figure(f"{prefix}text", inline_svg(drawing.figure, prefix), drawing.caption)


def _with_literature(table: Table) -> Table:
    try:
        return against_published([table])[0]
    except InvalidInput:  # nothing published of this protocol: the table stands alone
        return table


def _facts(group: Group) -> list[str]:
    done = [record for record in group.records if record.status == "done"]
    protocol = PROTOCOLS.get(group.protocol)
    facts = [f"{group.protocol}: {protocol.summary}" if protocol else group.protocol]

    def span(name: str) -> str:
        values = [record.counts[name] for record in done if name in record.counts]
        low, high = min(values, default=0), max(values, default=0)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    facts.append(
        f"A job trains on {span('train')} images and is tested on {span('test_normal')} normal and "
        f"{span('test_anomalous')} anomalous ones"
    )
    if any(record.counts.get("train_anomalous") for record in done):
        facts.append(f"Of the training images {span('train_anomalous')} are anomalous, on purpose")
    references = sorted({str(record.reference) for record in done})
    facts.append(f"Thresholds come from {span('reference')} {' and '.join(references)} normal images")
    return [*facts, *leaks(group.runs)]


def _verdict(group: Group, comparison: Comparison) -> list[str]:
    """What the table says, and how far that holds, in a few sentences."""
    table = group.table
    rivals = [name for name in group.detectors if table.cells[name][MEAN].complete]
    if not rivals:
        return ["No detector has finished every job, so none leads"]
    means = [cell_text(table.cells[name][MEAN]) for name in rivals]
    lines = [f"{rivals[0]} has a mean AUROC of {means[0]}, and no rival"]
    if len(rivals) > 1:
        level = table.ranks(MEAN)[0]
        lines = [f"{rivals[0]} has the highest mean AUROC, {means[0]}, before {rivals[1]}, {means[1]}"]
        if len(level) > 1:
            lines = [f"{', '.join(sorted(level))} share the highest mean AUROC, {means[0]}"]
        pair = next((each for each in comparison.pairs if {each.a, each.b} == {rivals[0], rivals[1]}), None)
        if pair and len(level) == 1:
            won = pair.wins_a if pair.a == rivals[0] else pair.wins_b
            lines.append(f"it is better in {won} of {len(table.classes)} classes (Wilcoxon, Holm: {p_text(pair.p_holm)})")
    if table.seeds == 1:
        lines.append("one seed: another seed may turn the order around")
    unfinished = len(table.rows) - len(rivals)
    if unfinished:
        verbs = ("lacks", "does") if unfinished == 1 else ("lack", "do")
        lines.append(f"{unfinished} of {len(table.rows)} detectors {verbs[0]} jobs and {verbs[1]} not compete")
    return lines


def examples(group: Group, budget: list[int]) -> tuple[dict[str, list[Example]], int]:
    """Examples of all detectors for the first class, then for the next, as long as the budget lasts; how many are left out."""
    records = {name: by_class(group, name) for name in group.detectors}
    found: dict[str, list[Example]] = {}
    left = 0
    for category in group.table.classes:
        for name, record in ((name, its[category]) for name, its in records.items() if category in its):
            made = None if left else Example(name, category, record.job.seed, list(_encoded(sheets(group, record))))
            size = sum(len(text) for _, text in made.sheets) * 3 // 4 if made else 0
            if made is None or size > budget[0]:
                left += 1
                continue
            budget[0] -= size
            found.setdefault(name, []).append(made)
    return found, left


def _encoded(made: Iterable[Sheet]) -> Iterator[tuple[Sheet, str]]:
    for sheet in made:
        yield sheet, base64.b64encode(png(sheet.pixels)).decode()


def machines(records: Iterable[RunRecord]) -> list[tuple[int, list[tuple[str, str]]]]:
    """Each environment that jobs ran in, with the number of its jobs, the most frequent first."""
    counts: Counter[str] = Counter()
    for record in records:
        plain = {name: value for name, value in record.environment.items() if name != "command"}
        counts[json.dumps(plain, sort_keys=True)] += 1
    return [(n, list(_flat(json.loads(text)))) for text, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        else:
            yield f"{prefix}{name}", str(value)


def commands(records: Iterable[RunRecord]) -> list[tuple[str, int]]:
    """The command lines that made the records, with the number of jobs of each, the most frequent first."""
    lines = Counter(shlex.join(map(str, record.environment.get("command", []))) for record in records)
    return sorted(((line, n) for line, n in lines.items() if line), key=lambda item: (-item[1], item[0]))


def failures(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Jobs that failed, by detector, data set, class and seed."""
    failed = [record for record in records if record.status != "done"]
    return sorted(failed, key=lambda r: (r.job.detector_label, r.job.dataset, r.job.protocol, r.job.category, r.job.seed))


def heading(table: Table) -> str:
    """What a table's caption adds to its section's title."""
    return caption(table).removeprefix(f"{table.dataset}, {table.protocol}: ")
