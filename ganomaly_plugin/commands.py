"""What each `bench` command does. Heavy modules are imported inside the command that needs them."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.escape import printable
from ganomaly_plugin.selection import parse_options, parse_seeds, parse_selection, show

DEFAULTS: dict[str, Any] = {"datasets": ["digits"], "protocols": ["one-anomalous/strict-v1"], "seeds": [0], "device": "auto"}
#: What `bench run` does unless --config or --datasets says otherwise: an honest table in about a minute on two cores.
QUICKSTART: dict[str, Any] = {**DEFAULTS, "image_size": 16, "preset": {"features": 16}, "out": "results/quickstart"}


def ls(options: Any) -> int:
    """Print the registered detectors, data sets and protocols whose names match a pattern, and the options of a single one."""
    from ganomaly_plugin.listing import listing

    print(listing(options.pattern))
    return 0


def experiment_from(options: Any) -> Any:
    """The `Experiment` of `bench run`'s options: the quickstart unless --config or --datasets is given."""
    from ganomaly_plugin.config import Experiment, check_keys
    from ganomaly_plugin.executors.choose import WHERE_OPTIONS
    from ganomaly_plugin.trust import check_class_paths, check_out, check_own_words, on_command_line

    given = {key: value for key, value in vars(options).items() if value is not None}
    configs, words, trusted = given.pop("config", None), given.pop("words", []), given.pop("trust", [])
    for config in configs or ():
        check_keys(str(config))
    if trusted and not on_command_line("--trust", words):
        raise InvalidInput("trust is for the command line, not for a config. Leave it out there, and write --trust MODULE.")
    if configs:
        check_own_words(given, words)
    if configs and "out" in given and not on_command_line("--out", words):
        check_out(str(given["out"]), map(str, configs))
    if configs and given.get("slurm_folder") and not on_command_line("--slurm-folder", words):
        check_out(str(given["slurm_folder"]), map(str, configs), "slurm_folder")
    for flag in ("dry_run", "retry_failed", "fail_fast", "logger", "trainer", "cuda_graphs", "stack", *WHERE_OPTIONS):
        given.pop(flag, None)
    quickstart = not configs and "datasets" not in given
    merged = {**(QUICKSTART if quickstart else DEFAULTS), **given}
    if not merged.get("models"):
        raise InvalidInput("No models given. Write --models ganomaly,ae, or set models: in a config; bench ls shows names.")
    if "out" not in merged:
        merged["out"] = f"results/{Path(str(configs[-1])).stem}" if configs else "results/run"
    hparams = merged.get("hparams", {})
    merged["hparams"] = parse_options(hparams) if isinstance(hparams, str) else _mapping(hparams)
    if "precision" in merged:  # a hyperparameter of every recipe, which other detectors do not have
        merged["hparams"] = {**merged["hparams"], "precision": merged.pop("precision")}
    merged["models"] = [parse_selection(item, "model") for item in merged["models"]]
    merged["datasets"] = [parse_selection(item, "data set") for item in merged["datasets"]]
    if configs:
        own = [word for word in words if not any(str(config) in word for config in configs)]
        for kind, key in (("detector", "models"), ("data set", "datasets")):
            check_class_paths(kind, [selection.name for selection in merged[key]], trusted, own)
    merged["seeds"] = parse_seeds(merged["seeds"])
    return Experiment(**merged)


def _mapping(value: Any) -> dict[str, Any]:
    found = value if isinstance(value, dict) else dict(vars(value)) if hasattr(value, "__dict__") else None
    if found is None:
        raise InvalidInput(f"hparams must be name: value pairs, got {value!r}. Write features=16,lr=1e-4.")
    return found


def run(options: Any) -> int:
    """Run a sweep: 0 all done, 1 a job failed or cannot be stored, 130 interrupted; tables on stdout, progress on stderr."""
    import multiprocessing

    from ganomaly_plugin.config import expand
    from ganomaly_plugin.datasets.base import data_root
    from ganomaly_plugin.detectors.base import resolve_device
    from ganomaly_plugin.executors.choose import WHERE_OPTIONS, Where, make_executor
    from ganomaly_plugin.files import as_path
    from ganomaly_plugin.progress import elapsed, following, status_folder
    from ganomaly_plugin.report.commands import tell
    from ganomaly_plugin.report.frame import runs_frame
    from ganomaly_plugin.report.loggers import Loggers, check_loggers
    from ganomaly_plugin.report.tables import leaks
    from ganomaly_plugin.report.writers import tables_of, to_text, write_tables
    from ganomaly_plugin.runner import Settings, check_unchanged, failure, make_plan, run_chunk, sweep
    from ganomaly_plugin.stacking import Stacking
    from ganomaly_plugin.store import Store
    from ganomaly_plugin.training.stack import check_how

    began = time.perf_counter()
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks, where it spawns
        raise InvalidInput(
            "A worker process imports the script that started it, and that starts bench run again. "
            'Put the call below if __name__ == "__main__":'
        )
    experiment = experiment_from(options)
    devices = tuple(options.devices) if options.devices is not None else None
    where = Where(**{name: getattr(options, name) for name in WHERE_OPTIONS} | {"devices": devices})
    where.check_device(experiment.device)
    here = resolve_device(experiment.device) if where.on_this_machine else None
    device = experiment.device.partition(":")[0] if here is None else here.type
    trainer = "auto" if options.trainer is None else options.trainer
    stacking = Stacking(trainer, on_gpu=device == "cuda", most=options.stack, workers=where.at_once)
    if stacking.how is not None and here is not None:
        check_how(stacking.how, here)
    check_loggers(options.logger or ())
    splits: dict[str, str] = {}
    jobs = expand(experiment, splits)
    out = as_path(experiment.out)
    if options.dry_run:
        there = Store(out) if Store.marker_of(out).is_file() else None
        plan = make_plan(jobs, there, retry_failed=options.retry_failed)
        if there is not None:
            check_unchanged(plan, there, splits)
        return _print_plan(plan, out)
    store = Store(out.absolute(), create=True)  # wherever a job may go
    plan = make_plan(jobs, store, retry_failed=options.retry_failed)
    check_unchanged(plan, store, splits)
    note = f"{len(jobs)} jobs: {len(plan.done)} done before, {len(plan.failed)} failed before, {len(plan.missing)} to run"
    print(f"{note} → {out}", file=sys.stderr)
    if plan.failed:
        print("failed jobs are kept; run them again with --retry-failed", file=sys.stderr)
    for remark in stacking.remarks(plan.missing):
        print(remark, file=sys.stderr)
    loggers = Loggers(options.logger or (), store.folder)
    for record in plan.done:
        loggers.log(record)
    status = status_folder(out)
    told = None if status is None else str(status)
    root = experiment.data_root if where.on_this_machine else str(data_root(experiment.data_root).resolve())
    settings = Settings(
        device=experiment.device,
        data_root=root,
        status=told,
        compiled=trainer == "compiled",
        how=stacking.how,
        cuda_graphs=options.cuda_graphs,
    )
    executor = make_executor(where, functools.partial(failure, settings=settings), store)
    interrupted = False
    try:
        run_here = functools.partial(run_chunk, settings=settings)
        records = contextlib.closing(sweep(plan, store, executor, run_here, stacking.chunks))
        with records as arriving, following(plan, status) as shown:
            for record in shown.follow(arriving):
                loggers.log(record)
                if options.fail_fast and record.status == "failed":
                    print("stopped at the first failure, as --fail-fast says", file=sys.stderr)
                    break
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: finished jobs are kept; the same command goes on from here", file=sys.stderr)
    if executor.parting:
        print(executor.parting, file=sys.stderr)
    everything, mine = store.records(), {job.key for job in jobs}
    frame = runs_frame(everything)
    made = tables_of(frame)
    failed = [record for record in everything if record.status == "failed" and record.job.key in mine]
    try:
        write_tables(store, frame, made)  # first: whoever reads what follows may go away
    finally:
        _show(to_text(made))
        tell([*leaks(frame), *(f"failed: {record.job.slug}: {record.error}" for record in failed)])
    print(f"tables in {out}: runs.csv, auc.csv, auc.tex, auc.md, cost.md ({elapsed(began)})", file=sys.stderr)
    if interrupted:
        return 130
    return 1 if failed else 0


def _show(tables: str) -> None:
    """Print what the files of a results folder have too: nothing is lost where nobody reads it, or its disk is full."""
    try:
        print(tables, end="", flush=True)
    except OSError:
        sys.stdout = None  # else the end of the process tries again


def _print_plan(plan: Any, out: Path) -> int:
    status = {**{r.job.key: "done" for r in plan.done}, **{r.job.key: "failed" for r in plan.failed}}
    for job in plan.jobs:
        state = status.get(job.key, "missing")
        print(printable(f"{state:9}{job.title} · {job.key}"))
    counts = Counter(status.get(job.key, "missing") for job in plan.jobs)
    listed = ", ".join(f"{counts.get(state, 0)} {state}" for state in ("done", "failed", "missing"))
    print(f"{len(plan.jobs)} jobs: {listed} (in {out})")
    return 0


def tables(options: Any) -> int:
    """Print the tables, or the classification reports, of a results folder, and write its table files again."""
    from ganomaly_plugin.store import without_collections

    with without_collections():
        from ganomaly_plugin.report.commands import tables as print_tables

        return print_tables(options)


def stats(options: Any) -> int:
    """Print intervals and tests of a results folder."""
    from ganomaly_plugin.report.commands import stats as print_stats

    return print_stats(options)


def plot(options: Any) -> int:
    """Draw a figure of a results folder."""
    from ganomaly_plugin.report.commands import plot as draw

    return draw(options)


def report(options: Any) -> int:
    """Make the HTML page of a results folder."""
    from ganomaly_plugin.report.commands import report as make_report

    return make_report(options)


def merge(options: Any) -> int:
    """Make one results folder out of several, and write its tables."""
    from ganomaly_plugin.combine import merge as merge_folders
    from ganomaly_plugin.report.frame import runs_frame
    from ganomaly_plugin.report.writers import tables_of, to_text, write_tables
    from ganomaly_plugin.store import Store

    merged = merge_folders(options.results, options.out, keep=options.keep)
    store = Store(options.out)
    frame = runs_frame(store.records())
    made = tables_of(frame)
    write_tables(store, frame, made)
    print(to_text(made), end="")
    for remark in merged.remarks:
        print(printable(remark), file=sys.stderr)
    print(f"{merged.copied} records copied to {store.folder}; {merged.shared} jobs were in several folders", file=sys.stderr)
    return 0


def diff(options: Any) -> int:
    """Say how two results folders differ: 0 the same jobs with the same scores, 1 otherwise."""
    from ganomaly_plugin.combine import compare

    found = compare(options.first, options.second)
    print("\n".join(found.lines()))
    return 0 if found.same else 1


def sys_info(options: Any) -> int:
    """Print what a record says of this machine, for a bug report."""
    import json

    from ganomaly_plugin.provenance import system_info

    found = system_info()
    print(json.dumps(found, indent=1) if options.json else "\n".join(f"{name:20}{value}" for name, value in found.items()))
    return 0


def test(options: Any) -> int:
    """Run the conformance suite on detectors; 1 when a check fails."""
    from ganomaly_plugin.conformance import run_checks
    from ganomaly_plugin.registry import detectors_like

    selections = [parse_selection(item, "model") for item in options.models]
    chosen = [(name, dict(each.options)) for each in selections for name in detectors_like(each.name)]
    totals: Counter[str] = Counter()
    for name, hparams in chosen:
        print(show(name, hparams))
        for result in run_checks(name, hparams, device=options.device):
            print(f"  {result.status:7} {result.check} ({result.seconds:.1f} s): {result.detail}", flush=True)
            totals[result.status] += 1
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['exempt']} exempt")
    return 1 if totals["failed"] else 0


def data(options: Any) -> int:
    """List data sets, check their images, or get them; check: 1 when images are bad or in both train and test."""
    from ganomaly_plugin.datasets import inspect
    from ganomaly_plugin.datasets.anomalib_sets import expand
    from ganomaly_plugin.datasets.base import data_root
    from ganomaly_plugin.registry import entries

    names = options.datasets
    if options.action == "ls" and not names:
        names = sorted(name for name in entries("data set") if not name.endswith(":"))
    if not names:
        raise InvalidInput(f"Which data sets? Write bench data {options.action} NAME; bench data ls shows the names.")
    root, ok = data_root(options.data_root), True
    chosen = [parse_selection(item, "data set") for item in names]
    if options.action == "get":
        for selection in chosen:
            print("\n".join(map(printable, inspect.get(selection.name, root, **selection.options))))
        return 0
    for name, its in [each for selection in chosen for each in expand(selection.name, root, dict(selection.options))]:
        if options.action == "check":
            report = inspect.check(name, root, **its)
            print("\n".join(map(printable, report.lines())))
            ok &= report.ok
        else:
            print("\n".join(map(printable, inspect.describe_lines(inspect.describe(name, root, **its)))))
    return 0 if ok else 1


def verify(options: Any) -> int:
    """Replay recordings; 1 when a difference exceeds its tolerance."""
    from ganomaly_plugin.verify import verify as replay

    ok = True
    for path in options.files:
        differences = replay(path, trainer=options.trainer, device=options.device)
        print(f"{path} (trainer {options.trainer}, device {options.device})")
        for d in differences:
            kind = "relative" if d.relative else "absolute"
            verdict = "ok" if d.passed else "EXCEEDED"
            print(f"  {d.kind:16}{d.largest:10.2e} {kind}, tolerance {d.tolerance:.0e}: {verdict} (at {d.where})")
        ok &= all(d.passed for d in differences)
    print("verified" if ok else "NOT verified: the replay differs from the recording by more than its tolerance")
    return 0 if ok else 1


def speed(options: Any) -> int:
    """Time training and scoring, side by side with peers."""
    from ganomaly_plugin.speed.command import run_speed

    return run_speed(options)
