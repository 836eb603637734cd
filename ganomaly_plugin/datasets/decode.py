"""One image file → uint8 pixels of the wanted size and channels; whatever is wrong with it → one reason."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from ganomaly_plugin.errors import InvalidInput, one_line
from ganomaly_plugin.escape import storable
from ganomaly_plugin.files import as_path

#: Images with more pixels are refused before they are decoded: Pillow's own limit against decompression bombs.
PIXEL_LIMIT = 89_478_485

_ENDINGS = "png jpg jpeg jpe jfif bmp dib tif tiff webp ppm pgm pbm pnm gif jp2 j2k tga avif"
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
FITS = ("crop", "pad")

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and I;16, I;16B, I;16L, I;16N


class BadImage(Exception):
    """An image file is not usable; the text is the reason, without the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(storable(reason))  # it may name a mask


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: what they warn of is either harmless here or found as an error. Wrap the thread pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, opened but not decoded; every failure inside, also of decoding, becomes BadImage."""
    try:
        # As a file, since Pillow garbles raw TIFFs that EXIF turns on their side when it maps them by their name.
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if width * height > PIXEL_LIMIT:
                raise BadImage(f"{width}×{height} is more than the limit of {PIXEL_LIMIT:,} pixels")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than the limit of {PIXEL_LIMIT:,} pixels") from error
    except PermissionError as error:
        raise BadImage("no permission to read it") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadImage(str(error.strerror).lower()) from error
    except MemoryError as error:
        raise BadImage("too large for the memory that is left") from error
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNG chunks as SyntaxError
        unreadable = error.strerror if isinstance(error, OSError) else None  # the system's; Pillow's own have a text alone
        raise BadImage(f"not readable: {unreadable}" if unreadable else f"damaged: {error}") from error
    except Exception as error:  # decoders meet hostile bytes with struct.error, ValueError, IndexError, ...
        raise BadImage(f"damaged: {one_line(error)}") from error


def is_grey(path: Path) -> bool:
    """Whether the file's mode is grey: 1, 8, 16 or 32 bits a pixel, with alpha or without, or a palette of greys.

    Raises:
        BadImage: It cannot be opened.
    """
    with _opened(path) as image:
        if image.mode in ("P", "PA"):
            used = image.convert("RGB").getcolors(256) or []
            return all(isinstance(colour, tuple) and len(set(colour)) == 1 for _, colour in used)
        return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says, with 0 as black."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:
        return Image.fromarray(65535 - np.asarray(upright))  # TIFF's WhiteIsZero; of 8 bits Pillow sees to it
    return upright


def read_upright(path: Path) -> Image.Image:
    """The whole image, of mode L or RGB, turned as its EXIF orientation says.

    16-bit values are scaled from [0, 65535], float ones from [0, 1]. Alpha is composited on black, which is what most
    inspection backgrounds are. CMYK and palettes become RGB.

    Raises:
        BadImage: It cannot be decoded, or its values are on no known scale.
    """
    with _opened(path) as image:
        upright = _upright(image)
        upright.load()
        mode = upright.mode
        if mode.startswith("I;16") or mode in ("I", "F"):
            return Image.fromarray(_scaled(np.asarray(upright), 1.0 if mode == "F" else 65535.0))
        if "A" in mode or "a" in mode or "transparency" in upright.info:
            clear = upright.convert("RGBA")
            black = Image.new("RGBA", clear.size, (0, 0, 0, 255))
            upright = Image.alpha_composite(black, clear)
        return upright.convert("L" if mode in _GREY_MODES else "RGB")


def _scaled(values: np.ndarray, full: float) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= full):  # also NaN
        raise BadImage(f"its values span [{low:g}, {high:g}], not [0, {full:g}]")
    return np.round(values * (255 / full)).astype(np.uint8)


def placement(width: int, height: int, size: int, fit: str) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """How an image is brought to `size`: the resized (width, height), and the box of the source it is resized from.

    "crop" is the short side to `size`, then the centre, as torchvision's Resize and CenterCrop do for GANomaly's
    authors; only what is kept is ever resized. "pad" is the long side to `size`; the rest stays black.
    """
    if fit == "pad":
        scale = size / max(width, height)
        return (max(1, round(width * scale)), max(1, round(height * scale))), (0, 0, width, height)
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    box = (left * width / wide, top * height / high, (left + size) * width / wide, (top + size) * height / high)
    return (size, size), box


def _fitted(image: Image.Image, size: int, fit: str, how: Image.Resampling) -> Image.Image:
    resized, box = placement(*image.size, size, fit)
    part = image.resize(resized, how, box)
    if resized == (size, size):
        return part
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(part, ((size - resized[0]) // 2, (size - resized[1]) // 2))
    return canvas


def decode(path: Path, *, size: int, channels: int, fit: str) -> tuple[np.ndarray, tuple[int, int]]:
    """One image, bilinear and antialiased.

    Args:
        path: The file.
        size: Side of the result, pixels.
        channels: 1 (colour becomes luma) or 3.
        fit: "crop" or "pad", see `placement`.

    Returns:
        uint8 `(channels, size, size)`, and the (width, height) of the upright original.

    Raises:
        BadImage: It is not usable.
    """
    upright = read_upright(path)
    image = upright.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(_fitted(image, size, fit, Image.Resampling.BILINEAR))
    return pixels.reshape(size, size, channels).transpose(2, 0, 1), upright.size


def read_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], shape: tuple[int, int, int], *, fit: str = "crop"
) -> np.ndarray:
    """Image files as a detector takes them, prepared as `folder:PATH` prepares them.

    Args:
        paths: One file or several.
        shape: `(c, h, w)` of the result, c 1 or 3 and h equal to w: a fitted detector's `image_shape_`.
        fit: "crop" or "pad", see `placement`.

    Returns:
        uint8 `(n, c, h, w)`, in the order of `paths`.

    Raises:
        InvalidInput: There is none, one is not usable, or an option is not allowed.
    """
    sizes = list(shape) if isinstance(shape, (tuple, list, np.ndarray)) else []
    if (
        len(sizes) != 3
        or not all(isinstance(each, Integral) for each in sizes)
        or sizes[1] != sizes[2]
        or sizes[0] not in (1, 3)
    ):
        raise InvalidInput(f"shape must be (c, h, w) with c 1 or 3 and h equal to w, got {shape!r}.")
    channels, size = int(sizes[0]), int(sizes[1])
    check_options(channels, fit, "fail", size)
    if not isinstance(paths, (str, os.PathLike, Iterable)):
        raise InvalidInput(f"paths must be the path of an image file, or several, got {paths!r}.")
    files = [as_path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not files:
        raise InvalidInput("There is no file to read. Give the paths of image files.")
    images = []
    with quiet_pillow():
        for file in files:
            try:
                images.append(decode(file, size=size, channels=channels, fit=fit)[0])
            except BadImage as error:
                raise InvalidInput(f"Cannot use the image {file}: {error}.") from error
    return np.stack(images)


def decode_mask(path: Path, image_size: tuple[int, int], *, size: int, fit: str) -> tuple[np.ndarray, bool]:
    """An image's mask of anomalous pixels, nearest neighbour; every value but 0 is anomalous.

    Args:
        path: The mask's file.
        image_size: (width, height) of its image.
        size: As of the image.
        fit: As of the image.

    Returns:
        bool `(size, size)`, and whether a mask that marked something marks nothing at this size.

    Raises:
        BadImage: It is not usable, or not of its image's size.
    """
    try:
        with _opened(path) as image:
            mask = _upright(image)
            values = np.asarray(mask.convert("L") if mask.mode in ("P", "RGB", "RGBA", "CMYK", "LA") else mask)
    except BadImage as error:
        raise BadImage(f"its mask {path.name} is {error}") from error
    if values.shape[::-1] != image_size:
        w, h = image_size
        raise BadImage(f"its mask {path.name} is {values.shape[1]}×{values.shape[0]}, the image {w}×{h}")
    if not values.any():
        raise BadImage(f"its mask {path.name} marks nothing: every value is 0")
    whole = Image.fromarray((values != 0).astype(np.uint8) * 255)
    small = np.asarray(_fitted(whole, size, fit, Image.Resampling.NEAREST)) > 0
    return small, not small.any()


def check_options(channels: int, fit: str, on_bad_image: str, image_size: int) -> None:
    """Raise InvalidInput for an option of image files that is not allowed."""
    if channels not in (0, 1, 3):
        raise InvalidInput(f"channels must be 0 (as the images), 1 or 3, got {channels}.")
    if fit not in FITS:
        raise InvalidInput(f"fit must be crop or pad, got {fit!r}.")
    if on_bad_image not in ("fail", "skip"):
        raise InvalidInput(f"on_bad_image must be fail or skip, got {on_bad_image!r}.")
    if image_size < 1:
        raise InvalidInput(f"image_size must be at least 1, got {image_size}.")
