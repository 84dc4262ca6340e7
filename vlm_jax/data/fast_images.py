"""`data.decoder=fast`: JPEGs decoded near the size that is wanted by libjpeg-turbo, resized by OpenCV. Not what an encoder was trained on.

Hugging Face's processors decode whole images and resize with Pillow's bicubic filter, which `images.py` repeats to the bit.
Here libjpeg-turbo decodes a half or less where that is large enough, OpenCV interpolates between four pixels. scripts/bench/input.py prints how much faster that is and by how much pixels differ.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from jaxtyping import UInt8

from vlm_jax.settings.checks import ConfigError


@functools.cache
def libraries() -> tuple[ModuleType, ModuleType]:
    """(cv2, simplejpeg). Raises ConfigError without them."""
    for name in ("cv2", "simplejpeg"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'data: decoder fast needs {name}: pip install "vlm_jax[fast]", or set data.decoder to exact.'
            )
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)  # the pipeline's threads and workers use the cores already
    return cv2, simplejpeg


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a grey or colour JPEG; None for another format, and for one in CMYK. Raises ValueError."""
    _, simplejpeg = libraries()
    if data[:3] != b"\xff\xd8\xff":
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    return (width, height) if colours in ("Gray", "YCbCr", "RGB") else None


def decode_jpeg(data: bytes, image_px: int, mode: str) -> UInt8[np.ndarray, "H W 3"]:
    """The image, or a half, a quarter or an eighth of it that is no smaller than what `fit` resizes it to. Raises ValueError."""
    _, simplejpeg = libraries()
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    wide, high = resized((width, height), image_px, mode)
    return simplejpeg.decode_jpeg(
        data, "RGB", fastdct=True, fastupsample=True, min_height=high, min_width=wide,
        min_factor=2,  # libjpeg-turbo has slow code for five eighths and the like
    )  # fmt: skip


def resized(size: tuple[int, int], image_px: int, mode: str) -> tuple[int, int]:
    """(width, height) to which an image of that size is resized: without its padding, or before it is cut."""
    if mode == "stretch":
        return image_px, image_px
    whole = max(size) if mode == "pad" else min(size)
    width, height = (max(1, int(image_px * side / whole)) for side in size)
    return width, height


def fit(
    image: UInt8[np.ndarray, "H W 3"], image_px: int, mode: str, mean: Sequence[float]
) -> UInt8[np.ndarray, "S S 3"]:
    """As images.fit, S = image_px: padded with int(255 * mean) before it is resized, or cut out of the middle afterwards."""
    cv2, _ = libraries()
    if mode == "pad":
        spare = [max(image.shape[:2]) - side for side in image.shape[:2]]
        (top, left), (bottom, right) = ([x // 2 for x in spare], [x - x // 2 for x in spare])
        filled = [int(255 * m) for m in mean]
        image = cv2.copyMakeBorder(
            image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=filled
        )
    height, width = image.shape[:2]
    size = resized((width, height), image_px, mode)
    shrinks = width / size[0]
    # A JPEG was decoded at less than twice this size; other formats may be larger.
    shrinking = cv2.INTER_LINEAR if shrinks <= 2 else cv2.INTER_AREA
    image = cv2.resize(image, size, interpolation=shrinking if shrinks > 1 else cv2.INTER_CUBIC)
    left, top = (size[0] - image_px) // 2, (size[1] - image_px) // 2
    return np.ascontiguousarray(image[top : top + image_px, left : left + image_px])
