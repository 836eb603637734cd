"""Contact sheets of a job's sample images: input, reconstruction and anomaly map, of each kind of example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ganomaly_plugin.core import RunRecord
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.report.figures.style import Canvas, Drawing, new_figure
from ganomaly_plugin.report.groups import Group, class_of
from ganomaly_plugin.samples import KINDS

FRAME = 1  # pixels between images
FRAME_GREY = 118


@dataclass(frozen=True)
class Sheet:
    """One kind of example of one job.

    Attributes:
        kind: "most anomalous" or another of samples.KINDS.
        rows: What each row shows.
        is_anomaly: The truth of each column.
        score: The score of each column.
        pixels: uint8 `(h, w, 3)`, framed.
        column: Width of a column with its frame, in pixels.
    """

    kind: str
    rows: tuple[str, ...]
    is_anomaly: np.ndarray
    score: np.ndarray
    pixels: np.ndarray
    column: int


def sheets(group: Group, record: RunRecord) -> list[Sheet]:
    """The job's sheets; [] when it kept no images."""
    images = group.results.store.images(record.job)
    if not images:
        return []
    arrays = group.arrays(record)
    rows = ("input", *(("reconstruction",) if "reconstruction" in images else ()), "map")
    coloured = {name: heat(images[name]) if name == "map" else rgb(images[name]) for name in rows}
    found = []
    for k, kind in enumerate(KINDS):
        mine = np.flatnonzero(images["kind"] == k)
        if len(mine) == 0:
            continue
        position = images["position"][mine]
        pixels = tiled([coloured[name][mine] for name in rows])
        column = coloured["input"].shape[2] + FRAME
        found.append(Sheet(kind, rows, arrays["is_anomaly"][position], arrays["score"][position], pixels, column))
    return found


def rgb(images: np.ndarray) -> np.ndarray:
    """uint8 `(n, c, h, w)` as `(n, h, w, 3)`; of other numbers of channels than three, the first in 128 greys."""
    three = images if images.shape[1] == 3 else np.repeat(images[:, :1] | 1, 3, axis=1)
    return three.transpose(0, 2, 3, 1)


def heat(maps: np.ndarray) -> np.ndarray:
    """uint8 `(n, h, w)` as `(n, h, w, 3)`, dark to bright in 64 steps, in a scale that also works without colour."""
    import matplotlib

    scale = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(np.uint8)
    return scale[maps // 4]


def tiled(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of images `(n, h, w, 3)` as one picture with a frame around each."""
    n, h, w, _ = rows[0].shape
    sheet = np.full((len(rows) * (h + FRAME) + FRAME, n * (w + FRAME) + FRAME, 3), FRAME_GREY, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = FRAME + i * (h + FRAME), FRAME + j * (w + FRAME)
            sheet[top : top + h, left : left + w] = image
    return sheet


def truth_words(sheet: Sheet) -> list[str]:
    """For each column its truth and score."""
    pairs = zip(sheet.is_anomaly, sheet.score, strict=True)
    return [f"{'anomalous' if truth else 'normal'} {score:.3g}" for truth, score in pairs]


def samples(group: Group, canvas: Canvas) -> Drawing:
    """All sheets of the group's first job that has some: of its best detector with images, first class, first seed.

    Raises:
        InvalidInput: No job kept images.
    """
    for name in group.detectors:
        for record in group.jobs(name):
            made = sheets(group, record)
            if made:
                return _draw(made, name, record, group, canvas)
    raise InvalidInput(f"No job on {group.title} kept sample images: its detectors have no anomaly map, or it is an old run.")


def _draw(made: list[Sheet], name: str, record: RunRecord, group: Group, canvas: Canvas) -> Drawing:
    columns = 2 if len(made) > 1 else 1
    rows = -(-len(made) // columns)
    panel = (canvas.width - 0.5) / columns
    shape = made[0].pixels.shape
    figure = new_figure(canvas.width, rows * (panel * shape[0] / shape[1] + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False)
    for k, (axes, sheet) in enumerate(zip(grid.flat, made, strict=False)):
        axes.imshow(sheet.pixels, interpolation="nearest")
        axes.set_title(sheet.kind, fontsize=7)
        axes.grid(visible=False)
        places = np.arange(len(sheet.score)) * sheet.column + sheet.column / 2
        words = [text.replace(" ", "\n").replace("anomalous", "anom.") for text in truth_words(sheet)]
        longest = max(len(line) for text in words for line in text.splitlines())
        axes.set_xticks(places, words, fontsize=min(5.5, 97 * panel / len(words) / longest))  # side by side
        step = (sheet.pixels.shape[0] - FRAME) / len(sheet.rows)
        texts = [text.replace("reconstruction", "recon.") for text in sheet.rows] if k % columns == 0 else []
        axes.set_yticks((np.arange(len(sheet.rows)) + 0.5) * step if texts else [], texts, fontsize=6)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in grid.flat[len(made) :]:
        axes.set_visible(False)
    caption = (
        f"Test images of {name} on {group.title}, class {class_of(record)}, seed {record.job.seed}, with truth and score: "
        f"the highest and lowest scores, the anomalies with the lowest and the normal images with the highest; maps bright "
        "where the difference is large."
    )
    return Drawing(figure, caption)


def png(pixels: np.ndarray) -> bytes:
    """A picture as PNG, with a palette where 256 colours are enough; the same bytes for the same pixels."""
    import io

    from PIL import Image

    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
        image.putpalette(colours.astype(np.uint8).tobytes())
    else:
        image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def by_class(group: Group, detector: str) -> Mapping[str, RunRecord]:
    """The first job of each class that kept images."""
    found: dict[str, RunRecord] = {}
    for record in group.jobs(detector):
        if group.results.store.images_path(record.job).is_file():
            found.setdefault(class_of(record), record)
    return found
