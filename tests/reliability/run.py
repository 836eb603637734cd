"""What the runner survives and what it costs, measured; writes the table under results/reliability.

python tests/reliability/run.py                      # all checks; about half an hour on two cores
python tests/reliability/run.py kill-runner --quick  # one of them, a few times only, printed and not written
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the jobs are tiny
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import costs  # noqa: E402
import disks  # noqa: E402
import kills  # noqa: E402
from runners import Row  # noqa: E402

from ganomaly_plugin.provenance import system_info  # noqa: E402

#: Each check: what does it, and how it is made quick. Other executors add theirs here.
CHECKS: dict[str, tuple[Callable[..., list[Row]], dict[str, int]]] = {
    "kill-runner": (kills.kill_runner, {"kills": 4}),
    "kill-workers": (kills.kill_workers, {"kills": 3}),
    "together": (kills.together, {"runners": 2}),
    "disks": (disks.disks, {"times": 1}),
    "overhead": (costs.overhead, {"jobs": 100, "repeats": 1}),
    "tables": (costs.tables, {"count": 1000, "repeats": 1}),
}
FIELDS = ["group", *(field.name for field in dataclasses.fields(Row)), "seconds", "hardware"]
MARKS = ("<!-- table: made by tests/reliability/run.py -->", "<!-- end -->")


def main() -> int:
    """Run the checks named on the command line, or all; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few times only; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "results" / "reliability")
    options = parser.parse_args()
    unknown = set(options.checks) - set(CHECKS)
    if unknown:
        parser.error(f"unknown check {sorted(unknown)[0]!r}; known: {', '.join(CHECKS)}")
    failed = 0
    for name in options.checks or CHECKS:
        check, quick = CHECKS[name]
        check = functools.partial(check, **quick) if options.quick else check
        with tempfile.TemporaryDirectory(prefix="bench-reliability-") as folder:
            began = time.monotonic()
            rows = check(Path(folder) / name)
            seconds = time.monotonic() - began
        for row in rows:
            failed += not row.passed
            verdict = "ok" if row.passed else "FAILED"
            print(f"{verdict:6} {row.check} × {row.times}: {row.result} (wanted: {row.wanted})", flush=True)
        if not options.quick:
            write(options.out, name, rows, seconds)
    return 1 if failed else 0


def hardware() -> str:
    """The machine in a few words."""
    info = system_info()
    return f"{info['cpu']}, {info['cores']} cores, torch {info['torch']}, Python {info['python']}"


def write(out: Path, group: str, rows: list[Row], seconds: float) -> None:
    """Put the rows of one check in the place of its old ones, in the CSV and in the README's table."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "reliability.csv"
    old = list(csv.DictReader(path.open())) if path.is_file() else []
    told = {"group": group, "seconds": f"{seconds:.0f}", "hardware": hardware()}
    new = [{**dataclasses.asdict(row), "passed": "yes" if row.passed else "no", **told} for row in rows]
    order = [*CHECKS, *(line["group"] for line in old), group]
    lines = sorted([line for line in old if line["group"] != group] + new, key=lambda line: order.index(line["group"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    readme = out / "README.md"
    text = readme.read_text() if readme.is_file() else "\n".join(["# Reliability", "", *MARKS, ""])
    before, _, rest = text.partition(MARKS[0])
    table = ["| what | times | result | wanted | |", "|---|---|---|---|---|"]
    verdict = {"yes": "ok", "no": "**missed**"}
    for line in lines:
        table.append(f"| {line['check']} | {line['times']} | {line['result']} | {line['wanted']} | {verdict[line['passed']]} |")
    readme.write_text(before + "\n".join([MARKS[0], "", *table, "", MARKS[1]]) + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    sys.exit(main())
