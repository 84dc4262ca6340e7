"""`data.decoder=fast`: nearly the exact decoder's pixels, for every mode, format and size, and the same refusals."""

import importlib.util
import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from vlm_jax.data import fast_images, images
from vlm_jax.data.images import ImageError
from vlm_jax.settings.checks import ConfigError

MEAN = (0.48, 0.46, 0.41)
LIMIT = 10**7


def encoded(image, fmt="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def both(data, px, mode, **options):
    return [images.load(data, px, mode, MEAN, LIMIT, decoder=d, **options).astype(int) for d in images.DECODERS]  # fmt: skip


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(skimage.data.coffee())  # 600 x 400


@pytest.mark.parametrize("mode", images.MODES)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "px", [64, 336, 448]
)  # a quarter, less than a half, and larger than the short side
def test_pixels_are_nearly_the_exact_ones(photograph, mode, fmt, px):
    options = {"quality": 95} if fmt != "PNG" else {}
    exact, fast = both(encoded(photograph, fmt, **options), px, mode)
    assert exact.shape == fast.shape == (px, px, 3)
    assert (
        np.abs(exact - fast).mean() < 6
    )  # half a pixel of 75 to the side, where the padding is odd
    assert not np.array_equal(exact, fast)  # two decoders, not one


@pytest.mark.parametrize("size", [(7, 90), (90, 7), (33, 32), (1, 1), (640, 480), (97, 33)])
@pytest.mark.parametrize("mode", images.MODES)
def test_every_shape_gives_a_square(size, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size)
    exact, fast = both(encoded(picture, quality=95), 32, mode)
    assert fast.shape == (32, 32, 3)
    assert np.abs(exact - fast).mean() < 16  # the filters differ on strips of 7 pixels


def test_padding_has_the_encoders_mean_and_stands_where_the_exact_one_does(photograph):
    exact, fast = both(encoded(photograph), 336, "pad")
    rows = np.abs(fast - [int(255 * m) for m in MEAN]).max(axis=(1, 2)) == 0
    assert list(np.flatnonzero(rows)) == [*range(56), *range(280, 336)]  # 336 x 224 in the middle
    assert np.array_equal(exact[:50], fast[:50])


def test_grey_cmyk_and_rotated_images(photograph):
    for picture in (photograph.convert("L"), photograph.convert("CMYK")):
        exact, fast = both(encoded(picture, quality=95), 64, "pad")
        assert np.abs(exact - fast).mean() < 6
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees
    exact, fast = both(encoded(photograph, exif=tags, quality=95), 64, "pad", exif_rotation=True)
    assert np.abs(exact - fast).mean() < 6


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError):
        images.load(data, 32, "pad", MEAN, LIMIT, decoder="fast")


def test_a_damaged_and_a_huge_jpeg_are_refused(photograph, tmp_path):
    data = encoded(photograph)
    with pytest.raises(ImageError, match="cannot be decoded"):
        images.load(data[: len(data) // 2], 32, "pad", MEAN, LIMIT, decoder="fast")
    path = tmp_path / "photograph.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="600x400 pixels exceed max_image_pixels 1000"):
        images.load(str(path), 32, "pad", MEAN, 1000, decoder="fast")
    strip = encoded(Image.new("RGB", (4000, 1)))
    with pytest.raises(ImageError, match="too elongated"):
        images.load(strip, 336, "crop", MEAN, 5000, decoder="fast")


def test_without_its_libraries_it_says_what_to_install(monkeypatch):
    fast_images.libraries.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "simplejpeg" else 1)  # fmt: skip
    with pytest.raises(ConfigError, match=r'decoder fast needs simplejpeg: pip install "vlm_jax\[fast\]"'):  # fmt: skip
        fast_images.libraries()
