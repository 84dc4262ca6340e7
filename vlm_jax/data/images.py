"""An image file to uint8 pixels [H W 3]: RGB, squared (pad, crop or stretch), resized with Pillow's filters.

The result equals what Hugging Face's CLIP and SigLIP processors hold before they divide by 255; the model
normalises on the device. EXIF orientation is ignored, as there, unless `exif_rotation` is asked for.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from vlm_jax import files
from vlm_jax.data import fast_images
from vlm_jax.settings.addresses import scheme
from vlm_jax.settings.checks import ConfigError

MODES = ("pad", "crop", "stretch")
DECODERS = ("exact", "fast")  # as Hugging Face's processors, or as fast_images.py
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# A padded or resized canvas may have at most this many times max_pixels, which bounds the memory for a 1 x N strip.
CANVAS_FACTOR = 4

# Pillow keeps up to this many freed blocks of image memory for the next images (1.6 MB for 640 x 480). Without that every image
# is new memory from the kernel, whose page faults took 18 % of a decoding process's CPU time.
Image.core.set_blocks_max(32)


class ImageError(ValueError):
    """An image that cannot be used; its text is the reason, without the file."""


def load(
    source: str | bytes | Callable[[], bytes],
    image_px: int,
    mode: str,
    mean: Sequence[float],
    max_pixels: int,
    resample: str = "bicubic",
    exif_rotation: bool = False,
    decoder: str = "exact",
) -> UInt8[np.ndarray, "H W 3"]:
    """The image of a path, of encoded bytes, or of a function that returns encoded bytes, as [image_px image_px 3].

    mean: the encoder's channel means in 0..1; `pad` fills with them. resample: a key of FILTERS. exif_rotation: turn and mirror
    it as its EXIF orientation says. decoder: one of DECODERS; fast has a filter of its own instead of `resample`. Raises
    ImageError for a missing, empty, damaged or non-image file, and for one whose header promises more than max_pixels (before
    decoding it), and ConfigError where the fast decoder's libraries are not installed.
    """
    try:
        stream = _stream(source)
        if decoder == "fast":
            return _fast(stream, image_px, mode, mean, max_pixels, exif_rotation)
        return fit(
            _decode(stream, max_pixels, exif_rotation), image_px, mode, mean, max_pixels, resample
        )
    except (ImageError, ConfigError):
        raise
    except FileNotFoundError:  # the parquet file of an embedded image
        raise ImageError("the image file does not exist") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from None
    except Image.UnidentifiedImageError:
        raise ImageError("not an image in a format Pillow knows") from None
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error!s:.300}") from None


def _stream(source: str | bytes | Callable[[], bytes]) -> str | io.BytesIO:
    if callable(source):
        source = source()
    if isinstance(source, bytes):
        if not source:
            raise ImageError("the image is empty (0 bytes)")
        return io.BytesIO(source)
    if scheme(source):
        return io.BytesIO(_of_bucket(source))
    try:
        status = files.to_path(source).stat()
    except (FileNotFoundError, NotADirectoryError):
        folder, name = os.path.split(source)
        there = "" if files.is_dir(folder) else ", which does not exist itself"
        raise ImageError(
            f"the image file does not exist; looked for {name[:200]!r} in {folder!r}{there}"
        ) from None
    except OSError as error:
        raise ImageError(f"the image file cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder, not an image file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is no regular file")
    if not status.st_size:
        raise ImageError("the image file is empty (0 bytes)")
    if not os.access(source, os.R_OK):
        raise ImageError("the image file cannot be read: Permission denied")
    return source


def _decode(stream: str | io.BytesIO, max_pixels: int, exif_rotation: bool) -> Image.Image:
    with Image.open(stream) as image:
        _check_size(image.size, max_pixels)
        return to_rgb(ImageOps.exif_transpose(image) if exif_rotation else image)


def _fast(
    stream: str | io.BytesIO,
    image_px: int,
    mode: str,
    mean: Sequence[float],
    max_pixels: int,
    exif_rotation: bool,
) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(stream, str):
        stream = io.BytesIO(files.read_bytes(stream))
    data = stream.getvalue()
    # Orientation tags and other formats than plain JPEG are Pillow's.
    if not exif_rotation and (size := fast_images.jpeg_size(data)):
        _check_size(size, max_pixels)
        pixels = fast_images.decode_jpeg(data, _resized(size, image_px, mode))
    else:
        pixels = np.asarray(_decode(stream, max_pixels, exif_rotation))
    size = (pixels.shape[1], pixels.shape[0])
    limit = max(max_pixels, image_px * image_px)
    if mode == "pad":
        _check_canvas(size, max(size) ** 2, limit)
        pixels = fast_images.pad_to_square(pixels, _filling(mean))
        return fast_images.resize(pixels, (image_px, image_px))
    wide, high = _resized(size, image_px, mode)
    _check_canvas(size, wide * high, limit)
    pixels = fast_images.resize(pixels, (wide, high))
    left, top = (wide - image_px) // 2, (high - image_px) // 2
    return np.ascontiguousarray(pixels[top : top + image_px, left : left + image_px])


def _of_bucket(source: str) -> bytes:
    try:
        data = files.read_bytes(source)
    except OSError as error:
        raise ImageError(f"the image file cannot be read: {error.strerror}") from None
    if not data:
        raise ImageError("the image file is empty (0 bytes)")
    return data


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"{size[0]}x{size[1]} pixels exceed max_image_pixels {max_pixels}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB as Pillow does (alpha is dropped), but 16-bit grey is scaled by 1/257 instead of clipped."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = (values + 128) // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    image.load()
    # `convert` would copy an RGB image, which took 7 % of the CPU time.
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(
    image: Image.Image,
    image_px: int,
    mode: str,
    mean: Sequence[float],
    max_pixels: int,
    resample: str = "bicubic",
) -> UInt8[np.ndarray, "H W 3"]:
    """An RGB image to [image_px image_px 3].

    pad: centred on a square of int(255 * mean), then resized (LLaVA's expand2square, SigLIP's resize).
    crop: shortest side resized to image_px, centre cut out (CLIP).  stretch: resized without regard to its shape.
    """
    if mode == "pad" and image.width != image.height:
        image = _pad(image, image_px, mean, max_pixels, FILTERS[resample])
    elif mode == "crop":
        return np.array(_crop(image, image_px, max_pixels, FILTERS[resample]))
    return np.array(image.resize((image_px, image_px), FILTERS[resample]))


def _resized(size: tuple[int, int], image_px: int, mode: str) -> tuple[int, int]:
    """(width, height) to which an image of that size is resized: without its padding, or before it is cut."""
    if mode == "stretch":
        return image_px, image_px
    whole = max(size) if mode == "pad" else min(size)
    width, height = (max(1, int(image_px * side / whole)) for side in size)
    return width, height


def _filling(mean: Sequence[float]) -> tuple[int, ...]:
    """The colour of padding."""
    return tuple(int(255 * m) for m in mean)


def _pad(
    image: Image.Image,
    image_px: int,
    mean: Sequence[float],
    max_pixels: int,
    resample: Image.Resampling,
) -> Image.Image:
    """The image with padding on two sides, [side side], or of a wide image [side image_px]: its rows are resized already.

    Resizing the result to [image_px image_px] gives the pixels of the padded square resized at once, because Pillow resizes
    rows first and rounds in between; without the rows of padding it is a fifth faster.
    """
    width, height = image.size
    side = max(width, height)
    _check_canvas(image.size, side * side, max_pixels)
    if width > height:
        image = image.resize((image_px, height), resample)
    canvas = Image.new("RGB", (image_px if width > height else side, side), _filling(mean))
    canvas.paste(image, ((canvas.width - image.width) // 2, (side - height) // 2))
    return canvas


def _crop(
    image: Image.Image, image_px: int, max_pixels: int, resample: Image.Resampling
) -> Image.Image:
    size = _resized(image.size, image_px, "crop")
    _check_canvas(image.size, size[0] * size[1], max(max_pixels, image_px * image_px))
    image = image.resize(size, resample)
    left, top = (size[0] - image_px) // 2, (size[1] - image_px) // 2
    return image.crop((left, top, left + image_px, top + image_px))


def _check_canvas(size: tuple[int, int], pixels: int, max_pixels: int) -> None:
    if pixels > CANVAS_FACTOR * max_pixels:
        raise ImageError(
            f"{size[0]}x{size[1]} is too elongated: squaring it takes {pixels} pixels,"
            f" more than {CANVAS_FACTOR} x max_image_pixels {max_pixels}"
        )
