"""Time the replayed steps of stacks on a GPU, and profile two of them: replayed.py OUT PRECISION MODELS WAY...

WAY is plain, captured (one model), implicit, matmul, grouped or streams. GANomaly, 1×32×32, 64 features, batches of 64, random
pixels; the median of five times five steps (plain and captured: twenty) by the host's clock, the device waited for. The kernels
of a step go to OUT/PRECISION.txt. A way that fails is a line.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.speed.trainers import Prepared, Setting, captured, plain
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.room import make_room

DEVICE = torch.device("cuda")
MFLOP = 551.1  # of an image, by `bench speed`


def prepared(way: str, recipe: GanomalyRecipe, setting: Setting) -> Prepared:
    """A step, recorded if it is not plain."""
    stage = recipe.stages[0]
    if way == "plain":
        return plain(recipe, stage, setting)
    if way == "captured":
        return captured(recipe, stage, setting, jobs=1)
    return captured(recipe, stage, setting, how=way)  # type: ignore[arg-type]


def kernels(step: Prepared) -> str:
    """Milliseconds and launches of a step, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        step.step()
        step.step()
        torch.cuda.synchronize()
    took: Counter[str] = Counter()
    launched: Counter[str] = Counter()
    for event in seen.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"\s+", " ", event.name)[:150]
            took[name] += event.device_time_total / 2e3
            launched[name] += 1
    total = sum(took.values())
    lines = [f"{ms:8.3f} ms {ms / total:5.1%} {launched[name] / 2:6.1f}x {name}" for name, ms in took.most_common(25)]
    return "\n".join([f"{launched.total() / 2:.0f} kernels, {total:.3f} ms", *lines])


def main(out: Path, name: str, models: int, ways: list[str]) -> None:
    """Print a line for each way."""
    recipe = GanomalyRecipe(features=64, batch_size=64, precision=name)  # type: ignore[arg-type]
    images = torch.randint(256, (4096, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for way in ways:
        make_room()
        began = time.perf_counter()
        try:
            with precision(recipe.precision):
                step = prepared(way, recipe, Setting(images, DEVICE, models))
                torch.cuda.synchronize()
                ready = time.perf_counter() - began
                torch.cuda.reset_peak_memory_stats()
                times, calls = [], 20 if step.models == 1 else 5
                for _ in range(6):
                    began = time.perf_counter()
                    for _ in range(calls):
                        step.step()
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - began) / calls * 1e3)
                profiled = kernels(step)
        except Exception as error:
            print(f"{name} {way} failed: {error}", flush=True)
            step = None
            make_room(error)
            continue
        median = statistics.median(times[1:])
        print(
            f"{name} {way}: {median:.3f} ms a step of {step.models} ({min(times[1:]):.3f} to {max(times[1:]):.3f}),"
            f" {MFLOP * step.images / median / 1e3:.1f} TFLOP/s, {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB,"
            f" ready in {ready:.1f} s",
            flush=True,
        )
        with (out / f"{name}.txt").open("a") as file:
            file.write(f"== {name} {way}, {step.models} models: {median:.3f} ms\n{profiled}\n")
        del step


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
