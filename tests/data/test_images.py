"""Pixels against Hugging Face's processors, every mode Pillow opens, and every way a file can be bad."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_jax.data import images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LIMIT = 10**6


def noise(width, height, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    coarse = (
        rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels)).repeat(4, 0).repeat(4, 1)
    )
    return (
        0.7 * coarse[:height, :width] + 0.3 * rng.integers(0, 256, (height, width, channels))
    ).astype(np.uint8)


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def load(source, px=32, mode="stretch", mean=CLIP_MEAN, max_pixels=LIMIT):
    return images.load(source, px, mode, mean, max_pixels)


SIZES = [(64, 48), (48, 64), (33, 97), (100, 31), (32, 32), (20, 30), (333, 77)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("px", [32, 56])
def test_crop_equals_the_clip_processor(size, px):
    image = Image.fromarray(noise(*size))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": px}, crop_size={"height": px, "width": px}
    )
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (load(encoded(image), px, "crop") / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert ours.shape == (px, px, 3)
    assert np.abs(ours - theirs).max() < 1 / 255


@pytest.mark.parametrize("size", SIZES)
def test_stretch_equals_the_siglip_processor(size):
    image = Image.fromarray(noise(*size))
    processor = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (load(encoded(image), 40) / 255.0 - 0.5) / 0.5
    assert np.abs(ours - theirs).max() < 1 / 255


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_expand2square_then_the_clip_processor(size):
    image = Image.fromarray(noise(*size))
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in CLIP_MEAN))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    theirs = processor(square, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (load(encoded(image), mode="pad") / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert np.abs(ours - theirs).max() < 1 / 255


@pytest.mark.parametrize("resample", images.FILTERS)
@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (7, 300), (300, 7), (225, 224), (224, 90)]
)
def test_padding_after_the_rows_are_resized_changes_no_pixel(size, resample):
    px, mean = 224, (0.48, 0.1, 0.9)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    square = Image.new("RGB", (max(size),) * 2, tuple(int(255 * m) for m in mean))
    square.paste(Image.fromarray(noise), tuple((max(size) - side) // 2 for side in size))
    expected = np.array(square.resize((px, px), images.FILTERS[resample]))
    found = images.fit(Image.fromarray(noise), px, "pad", mean, 10**7, resample)
    np.testing.assert_array_equal(found, expected)


def test_padding_is_the_mean_colour_and_an_odd_pixel_goes_below():
    white = Image.new("RGB", (8, 5), (255, 255, 255))
    pixels = load(encoded(white), px=8, mode="pad")
    assert pixels[0].tolist() == [[122, 116, 104]] * 8
    assert pixels[:, 0, 0].tolist() == [122, 255, 255, 255, 255, 255, 122, 122]


def test_exif_orientation_is_ignored():
    image = Image.fromarray(noise(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
    assert turned != plain
    assert np.array_equal(load(turned), load(plain))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode):
    image = Image.fromarray(noise(32, 32)).convert(mode)
    data = encoded(image, "TIFF")
    assert np.array_equal(load(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_alpha_is_dropped_not_blended():
    red = Image.new("RGBA", (32, 32), (200, 10, 20, 0))
    assert load(encoded(red))[5, 5].tolist() == [200, 10, 20]


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    pixels = load(encoded(Image.fromarray(ramp)))
    assert np.abs(pixels[..., 0].astype(float) - ramp / 257).max() <= 0.5
    assert (pixels[..., 0] == pixels[..., 2]).all()
    dark = np.full((32, 32), 200, np.uint16)  # still 16 bits: nearly black
    assert load(encoded(Image.fromarray(dark))).max() == 1


def test_a_path_and_its_bytes_give_the_same_pixels(tmp_path):
    data = encoded(Image.fromarray(noise(50, 30)), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.array_equal(load(str(tmp_path / "a.jpg")), load(data))


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
PNG = encoded(Image.fromarray(noise(64, 64)))
BAD = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "not an image"),
    "jpeg_cut": (JPEG[: len(JPEG) // 2], "cannot be decoded.*truncated"),
    "jpeg_header_only": (JPEG[:20], "cannot be decoded|not an image"),
    "png_cut": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png_damaged": (PNG[:200] + b"\0" * 400 + PNG[600:], "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_say_why(name):
    data, reason = BAD[name]
    with pytest.raises(images.ImageError, match=reason):
        load(data)


def test_missing_and_empty_files_and_folders_say_why(tmp_path):
    with pytest.raises(images.ImageError, match="does not exist"):
        load(str(tmp_path / "no.png"))
    (tmp_path / "empty.png").touch()
    with pytest.raises(images.ImageError, match="empty"):
        load(str(tmp_path / "empty.png"))
    with pytest.raises(images.ImageError, match=r"^is a folder, not an image file$"):
        load(str(tmp_path))
    with pytest.raises(images.ImageError) as caught:
        load(str(tmp_path / "no" / "a.png"))
    assert str(caught.value) == (
        f"the image file does not exist; looked for 'a.png' in '{tmp_path}/no', which does not exist itself"
    )
    with pytest.raises(images.ImageError, match="is no regular file"):
        load("/dev/null")
    for name in ("a\0b.png", "x" * 300, "\ud800.png"):  # what a record may hold
        with pytest.raises(images.ImageError, match=r"cannot be (decoded|read)"):
            load(str(tmp_path / name))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_turns_an_image_as_pillow_does_and_is_off_by_default(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    data = stream.getvalue()
    stored = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(stored)
    assert turned.size == ((24, 16) if orientation < 5 else (16, 24))
    for mode in images.MODES:
        plain = images.load(data, 32, mode, CLIP_MEAN, LIMIT)
        np.testing.assert_array_equal(plain, images.fit(stored, 32, mode, CLIP_MEAN, LIMIT))
        found = images.load(data, 32, mode, CLIP_MEAN, LIMIT, exif_rotation=True)
        np.testing.assert_array_equal(found, images.fit(turned, 32, mode, CLIP_MEAN, LIMIT))
        assert np.array_equal(found, plain) == (orientation == 1)


def png_header(width, height):
    """A PNG that promises a size and holds nothing: decoding it would fail otherwise than its size does."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + ihdr
        + struct.pack(">I", zlib.crc32(ihdr))
        + struct.pack(">I", 9)
        + b"IDAT"
    )


def test_a_large_image_is_refused_from_its_header():
    with pytest.raises(images.ImageError, match="2000x1000 pixels exceed max_image_pixels 1000000"):
        load(png_header(2000, 1000))
    with pytest.raises(images.ImageError, match="too many pixels"):
        load(png_header(100_000, 100_000), max_pixels=10**12)  # Pillow's own limit
    at_limit = encoded(Image.new("RGB", (100, 100)))
    assert load(at_limit, max_pixels=10_000).shape == (32, 32, 3)
    with pytest.raises(images.ImageError, match="exceed"):
        load(at_limit, max_pixels=9_999)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_strip_is_refused_before_it_is_squared(mode):
    strip = encoded(Image.new("RGB", (20_000, 2)))
    with pytest.raises(images.ImageError, match="too elongated"):
        load(strip, mode=mode, max_pixels=50_000)
    assert load(strip, mode="stretch", max_pixels=50_000).shape == (32, 32, 3)
