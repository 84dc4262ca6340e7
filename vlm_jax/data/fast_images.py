"""What `data.decoder=fast` takes from libjpeg-turbo and OpenCV; images.py puts it together.

Hugging Face's processors decode whole images and resize with Pillow's bicubic filter, which `images.py` repeats to the bit. Here
libjpeg-turbo decodes a half or less of a JPEG where that is large enough, and OpenCV interpolates between four pixels.
scripts/bench/input.py prints how much faster that is, and by how much pixels differ from those that an encoder was trained on.
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


def decode_jpeg(data: bytes, least: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The image, or a half, a quarter or an eighth of it that has at least `least` (width, height). Raises ValueError."""
    _, simplejpeg = libraries()
    return simplejpeg.decode_jpeg(
        data, "RGB", fastdct=True, fastupsample=True, min_width=least[0], min_height=least[1],
        min_factor=2,  # libjpeg-turbo has slow code for five eighths and the like
    )  # fmt: skip


def pad_to_square(
    image: UInt8[np.ndarray, "H W 3"], colour: Sequence[int]
) -> UInt8[np.ndarray, "S S 3"]:
    """The image in the middle of a square."""
    cv2, _ = libraries()
    side = max(image.shape[:2])
    top, left = ((side - length) // 2 for length in image.shape[:2])
    bottom, right = side - image.shape[0] - top, side - image.shape[1] - left
    return cv2.copyMakeBorder(
        image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=list(colour)
    )


def resize(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """size: (width, height)."""
    cv2, _ = libraries()
    shrinks = image.shape[1] / size[0]
    # A JPEG was decoded at less than twice this size; other formats may be larger.
    shrinking = cv2.INTER_LINEAR if shrinks <= 2 else cv2.INTER_AREA
    return cv2.resize(image, size, interpolation=shrinking if shrinks > 1 else cv2.INTER_CUBIC)
