"""The `bench speed` command: time, print the tables with their ratios, and write the CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ganomaly_plugin.datasets.base import MAX_SIDE, load_dataset
from ganomaly_plugin.detectors.base import resolve_device
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.files import as_path, atomic_write, check_writable
from ganomaly_plugin.hparams import default_hparams
from ganomaly_plugin.provenance import cpu_name, versions
from ganomaly_plugin.recipe import Precision
from ganomaly_plugin.registry import resolve
from ganomaly_plugin.selection import Selection, parse_selection
from ganomaly_plugin.speed.measure import Row, has_peers, recipe_of, time_scoring, time_training
from ganomaly_plugin.speed.peers import PEERS
from ganomaly_plugin.speed.timing import WARM_UP
from ganomaly_plugin.speed.trainers import TRAINERS, Setting

MEASURES = ("training", "scoring")
_MEBI = 2**20
_HEAD = (
    *("", "images/s", "ms a call", "fastest–slowest", "time", "latency ms", "MiB", "parameters"),
    *("MFLOP/image", "of ceiling", "MB/image", "of bandwidth"),
)


def run_speed(options: Any) -> int:
    """Time what `options` name, print it, and write `options.out`."""
    _check(options)
    device = resolve_device(options.device)
    selections = [_completed(parse_selection(item, "model"), options) for item in options.models]
    if options.measure == ["training"] and all(recipe_of(selection) is None for selection in selections):
        raise InvalidInput("None of --models has training steps to be timed. Add one, or give --measure scoring.")
    images = _images(options)
    setting = Setting(torch.from_numpy(images), device, options.jobs)
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    shape = "×".join(map(str, images.shape[1:]))
    print(f"{shape}, {options.dataset or 'random pixels'}, on {hardware}, torch {versions()['torch']}")
    print(f"medians of {options.repeats} turns, after {WARM_UP} calls to warm up", flush=True)
    rows: list[Row] = []
    common = {"shape": shape, "pixels": options.dataset or "random", "hardware": hardware, "device": device.type}
    common |= {name: versions().get(name, "") for name in ("ganomaly-plugin", "torch", "anomalib")}

    def tell(title: str, part: list[Row]) -> None:
        """Print a part of the rows, and write all that there are so far."""
        rows.extend(part)
        if part:
            print("\n".join(["", title, *_table(part, options.repeats)]), flush=True)
        if options.out and rows:
            atomic_write(as_path(options.out), _csv(rows, common).encode())

    if "training" in options.measure:
        for selection in selections:
            if recipe_of(selection) is None:
                print(f"{selection.name} has no training steps: only its scoring is timed")
        known = any(has_peers(recipe_of(selection)) for selection in selections)
        usual = ["authors"] if known else []
        peers = usual if options.peers is None else [peer for peer in options.peers if peer != "none"]
        # The nearest that they know.
        peer_precision: Precision = "float32" if options.precision in (None, "float32") else "tf32"
        training = time_training(
            selections, options.trainers, peers, setting, repeats=options.repeats, peer_precision=peer_precision
        )
        tell("training", training)
    if "scoring" in options.measure:
        shown = images[: options.images]
        tell(f"scoring {len(shown)} images", time_scoring(selections, shown, device, repeats=options.repeats))
    return 0 if rows else 1


def _check(options: Any) -> None:
    for name in ("models", "trainers", "measure"):
        if not getattr(options, name):
            raise InvalidInput(f"{name} is empty. Give at least one.")
    for name, smallest in (("repeats", 5), ("images", 1), ("jobs", 1), ("batch_size", 1), ("image_size", 1)):
        value = getattr(options, name)
        if value < smallest:
            why = " for a median" if name == "repeats" else ""
            raise InvalidInput(f"{name} must be at least {smallest}{why}, got {value}.")
    if options.image_size > MAX_SIDE:
        raise InvalidInput(f"image_size must be at most {MAX_SIDE}, got {options.image_size}.")
    for kind, given, known in (
        ("trainer", options.trainers, TRAINERS),
        ("peer", options.peers or (), (*PEERS, "none")),
        ("measure", options.measure, MEASURES),
    ):
        for name in given:
            check_known(kind, name, known)
    if options.peers not in (None, ["none"]) and "none" in options.peers:
        raise InvalidInput("--peers none stands alone.")
    if options.channels not in (None, 1, 3):
        raise InvalidInput(f"channels must be 1 or 3, got {options.channels}.")
    if options.dataset and options.channels:
        raise InvalidInput("--channels is of random pixels; images of a --dataset have their own. Leave one of them out.")
    if options.out:
        check_writable(as_path(options.out))


def _completed(selection: Selection, options: Any) -> Selection:
    """`selection` with the command's width, batch size and precision where the detector has them and does not say itself."""
    known = default_hparams(resolve("detector", selection.name))
    shared = {name: getattr(options, name) for name in ("features", "batch_size", "precision")}
    given = {name: value for name, value in shared.items() if value is not None and name in known and value != known[name]}
    return Selection(selection.name, {**given, **selection.options})


def _images(options: Any) -> np.ndarray:
    """Enough images for an epoch of many batches, and for scoring."""
    count = max(options.images, 64 * options.batch_size)
    if options.dataset:
        dataset = load_dataset(options.dataset, root=options.data_root, image_size=options.image_size)
        return np.ascontiguousarray(dataset.images[:count])
    shape = (count, options.channels or 1, options.image_size, options.image_size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def figures(row: Row, first: Row) -> dict[str, str]:
    """The row's figures as they are written to the CSV; ratios are of times per image, to the first row of the detector."""
    timing, latency = row.timing, row.latency

    return {
        "what": row.what,
        "detector": row.detector,
        "trainer": row.trainer,
        "precision": row.precision,
        "models": str(row.models),
        "images_per_second": _number(row.images_per_second),
        "time_ratio_to_first": _number(first.images_per_second / row.images_per_second),
        "median_ms": _number(timing.median, 1e-3),
        "fastest_ms": _number(timing.fastest, 1e-3),
        "slowest_ms": _number(timing.slowest, 1e-3),
        "images_per_call": str(row.images),
        "turns": str(timing.repeats),
        "calls_per_turn": str(timing.burst),
        "latency_ms": _number(latency.median, 1e-3) if latency else "",
        "peak_memory_mib": _number(row.peak_memory, _MEBI),
        "parameters": str(row.parameters),
        "mflop_per_image": _number(row.flops, 1e6),
        "gflop_per_second": "" if row.flops is None else _number(row.flops * row.images_per_second, 1e9),
        "ceiling_gflop_per_second": _number(row.ceiling, 1e9),
        "share_of_ceiling": _number(row.share),
        "mb_moved_per_image": _number(row.moved, 1e6),
        "copy_gb_per_second": _number(row.bandwidth, 1e9),
        "share_of_bandwidth": _number(row.share_of_bandwidth),
    }


def _number(value: float | None, unit: float = 1) -> str:
    """Six digits of `value`, however small it is, so that ratios of what is written are those that are written."""
    return "" if value is None else f"{value / unit:.6g}"


def _tenths(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.1f}"


def _firsts(rows: Sequence[Row]) -> list[Row]:
    """For each row what its ratio is to: of training the first row of its detector, of scoring the first row of all."""
    return [next(r for r in rows if r.what == "scoring" or r.detector == row.detector) for row in rows]


def _table(rows: Sequence[Row], repeats: int) -> list[str]:
    lines = [list(_HEAD)]
    for row, first in zip(rows, _firsts(rows), strict=True):
        span = f"{row.timing.fastest * 1e3:.2f}–{row.timing.slowest * 1e3:.2f}"
        share, of_bandwidth = ("" if each is None else f"{each:.1%}" for each in (row.share, row.share_of_bandwidth))
        latency = f"{row.latency.median * 1e3:.2f}" if row.latency else ""
        lines.append(
            [
                _name(row),
                f"{row.images_per_second:.1f}",
                f"{row.timing.median * 1e3:.2f}",
                span,
                f"×{_ratio(row, first)}",
                latency,
                _tenths(row.peak_memory, _MEBI),
                f"{row.parameters:,}",
                _tenths(row.flops, 1e6),
                share,
                _tenths(row.moved, 1e6),
                of_bandwidth,
            ]
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(_HEAD))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    ceilings = {f"{row.ceiling / 1e9:.0f} GFLOP/s in {row.precision}" for row in rows if row.ceiling}
    ceilings |= {f"{row.bandwidth / 1e9:.0f} GB/s in copying" for row in rows if row.bandwidth}
    fewer = [
        f"{_name(row)}: a median of {row.timing.repeats} turns only, since they take so long"
        for row in rows
        if row.timing.repeats < repeats
    ]
    return [*text, *fewer, *(f"ceiling: {line}" for line in sorted(ceilings)), *_ratios(rows)]


def _ratio(row: Row, other: Row) -> str:
    """Time per image of `row` in units of that of `other`, such as 0.73 or 0.028 (1/36)."""
    ratio = other.images_per_second / row.images_per_second
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g} (1/{1 / ratio:.0f})"


def _ratios(rows: Sequence[Row]) -> list[str]:
    """Time per image of each row against every row before it of the same detector, where there are more than two."""
    lines = []
    for k, row in enumerate(rows):
        before = [other for other in rows[:k] if row.what == "training" and other.detector == row.detector]
        if len(before) > 1:
            parts = [f"{_ratio(row, other)} of {other.trainer}" for other in before]
            lines.append(f"{row.detector}, {row.trainer}: time per image {', '.join(parts)}")
    return lines


def _name(row: Row) -> str:
    models = f" × {row.models}" if row.models > 1 else ""
    return f"{row.detector}, {row.trainer}{models}, {row.precision}" if row.trainer else row.detector


def _csv(rows: Sequence[Row], common: dict[str, str]) -> str:
    text = io.StringIO()
    lines = [{**figures(row, first), **common} for group in MEASURES for row, first in _pairs(rows, group)]
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _pairs(rows: Sequence[Row], what: str) -> list[tuple[Row, Row]]:
    chosen = [row for row in rows if row.what == what]
    return list(zip(chosen, _firsts(chosen), strict=True))
