"""The image processor of a directory in every form that transformers writes and reads, against transformers' own pixels."""

import json
import logging
import re

import numpy as np
import pytest
import transformers
from PIL import Image
from refs import tokenizers
from test_hf_inputs import CLIP, EDGE, HALF, PX

from vlm_jax.data import images
from vlm_jax.hf import pixels
from vlm_jax.settings.checks import ConfigError

SQUARE = dict(size={"height": PX, "width": PX})
CROP, STRETCH, PAD = ("crop", "bicubic"), ("stretch", "bicubic"), ("pad", "bicubic")
# name -> (class, file, its content, side, image_mode and resample)
FORMS = {
    "nested, as transformers 5 saves": (
        "CLIPImageProcessorPil", "processor_config.json",
        {"image_processor": {"image_processor_type": "CLIPImageProcessor", "resample": 3, **EDGE, **CLIP}, "patch_size": 8}, PX, CROP,
    ),
    "nested, fast, siglip": (
        "SiglipImageProcessorPil", "processor_config.json",
        {"image_processor": {"image_processor_type": "SiglipImageProcessorFast", "resample": 2, **SQUARE, **HALF}}, PX, ("stretch", "bilinear"),
    ),
    "nested, padded": (
        "LlavaImageProcessorPil", "processor_config.json",
        {"image_processor": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **EDGE, **CLIP}}, PX, PAD,
    ),
    "of the first files of CLIP": (
        "CLIPImageProcessorPil", "preprocessor_config.json",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": PX, "crop_size": PX, "do_center_crop": True, "resample": 3, **CLIP}, PX, CROP,
    ),
    "nothing but the class": ("CLIPImageProcessorPil", "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, 224, CROP),
    "nothing but siglip's class": ("SiglipImageProcessorPil", "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}, 224, STRETCH),
    "null is the default": (
        "CLIPImageProcessorPil", "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessorFast", "resample": 3, "default_to_square": False,
         "input_data_format": None, **EDGE, **CLIP}, PX, CROP,
    ),
    "a list": ("SiglipImageProcessorPil", "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor", "size": [PX, PX]}, PX, STRETCH),
    "stretched, then nothing to crop": (
        "CLIPImageProcessorPil", "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", **SQUARE, "crop_size": {"height": PX, "width": PX}, **CLIP}, PX, STRETCH,
    ),
    "padding that CLIP's processor has no use for": (
        "CLIPImageProcessorPil", "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", "do_pad": True, **EDGE, **CLIP}, PX, CROP,
    ),
    "padded, not cropped": (
        "LlavaImageProcessorPil", "preprocessor_config.json",
        {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True, **EDGE, "do_center_crop": False, **CLIP}, PX, PAD,
    ),
}  # fmt: skip


def same_pixels(found: dict, side: int, processor, tmp_path) -> None:
    """Our pixels of pictures in three shapes against those of transformers' processor."""
    mean, std = (np.array(found[name])[:, None, None] for name in ("mean", "std"))
    for shape in ((31, 57), (90, 40), (13, 20)):
        values = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
        picture = Image.fromarray(values)
        picture.save(tmp_path / "picture.png")
        ours = images.load(str(tmp_path / "picture.png"), side, found["image_mode"], found["mean"], 10**6, found["resample"])  # fmt: skip
        theirs = processor(picture, return_tensors="np")["pixel_values"][0] * std + mean
        difference = np.abs(ours.transpose(2, 0, 1) / 255 - theirs).max()
        assert difference < (1 / 255 + 1e-6 if found["image_mode"] == "pad" else 1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_settings_gives_transformers_pixels(name, tmp_path):
    cls, file, content, side, taken = FORMS[name]
    (tmp_path / file).write_text(json.dumps(content))
    found = pixels.preprocessing(tmp_path, side)
    assert (found["image_mode"], found["resample"]) == taken
    same_pixels(found, side, getattr(transformers, cls).from_pretrained(tmp_path), tmp_path)


def test_what_a_processor_of_llava_saves_is_read(tmp_path):
    """Written by this release of transformers itself; the settings beside it, of an older release, do not count."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers.llama_like(tmp_path / "tokenizer"))  # fmt: skip
    own = transformers.CLIPImageProcessorPil(**EDGE)
    transformers.LlavaProcessor(own, tokenizer, patch_size=8).save_pretrained(tmp_path / "model")
    found = pixels.preprocessing(tmp_path / "model", PX)
    same_pixels(found, PX, own, tmp_path)
    assert found["image_mode"] == "crop"
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(HALF | SQUARE))
    assert pixels.preprocessing(tmp_path / "model", PX) == found


FAMILIES = {
    "clip_vision_model": ("CLIPImageProcessorPil", EDGE, {"model_type": "clip_vision_model"}, "clip's default (image_mode crop, bicubic)"),
    "llava": ("CLIPImageProcessorPil", EDGE, {"model_type": "llava", "text_config": {}}, "clip's default (image_mode crop, bicubic)"),
    "siglip": ("SiglipImageProcessorPil", SQUARE, {"model_type": "siglip"}, "siglip's default (image_mode stretch, bicubic)"),
    "llava with siglip": (
        "SiglipImageProcessorPil", SQUARE, {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}},
        "siglip's default (image_mode stretch, bicubic)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_without_a_processor_says_so_and_takes_its_family_s_default(name, tmp_path, caplog):  # fmt: skip
    cls, sizes, config, said = FAMILIES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))  # fmt: skip
    for _ in range(2):
        found = pixels.preprocessing(tmp_path, PX)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{tmp_path} has no image processor (preprocessor_config.json): images are prepared as by {said}."
    ]
    same_pixels(found, PX, getattr(transformers, cls)(**sizes), tmp_path)


REFUSED = {
    "NaFlex": ({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256}, "Siglip2ImageProcessor prepares images"),
    "NaFlex without a name": ({"max_num_patches": 256, "patch_size": 16}, "max_num_patches 256 (NaFlex: grids as wide as the picture)"),
    "Qwen2-VL": ({"image_processor_type": "Qwen2VLImageProcessorFast"}, "Qwen2VLImageProcessorFast prepares images"),
    "tiles": ({"image_processor_type": "LlavaNextImageProcessor", **EDGE}, "LlavaNextImageProcessor prepares images in a way that is not computed here; allowed: CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor."),
    "other code": ({"auto_map": {"AutoImageProcessor": "processing.MineImageProcessor"}}, "MineImageProcessor prepares images"),
    "a crop that the class has by default": ({"image_processor_type": "CLIPImageProcessor", "size": PX}, f"resized to {PX} px and cropped to 224 px"),
    "a crop that is no square": ({**EDGE, "crop_size": {"height": PX, "width": 12}}, f"{PX}x12 px is no square"),
    "no crop": ({**EDGE, "do_center_crop": False}, "shortest_edge without do_center_crop leaves no square"),
    "no crop by null": ({**EDGE, "do_center_crop": None}, "shortest_edge without do_center_crop leaves no square."),
    "no resize by null": ({**EDGE, "do_resize": None}, "do_resize is null; that step is always taken here."),
    "a longest edge": ({**EDGE, "size": {"shortest_edge": PX, "longest_edge": 99}}, "size {'shortest_edge': 24, 'longest_edge': 99} is not computed here"),
    "two means": ({**EDGE, "image_mean": [0.5, 0.5]}, "image_mean [0.5, 0.5] is not three numbers"),
    "a factor in words": ({**EDGE, "rescale_factor": "1/255"}, "rescale_factor '1/255' is not 1/255"),
    "no rescaling": ({**EDGE, "do_rescale": False}, "do_rescale is false"),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_processor_that_is_not_computed_is_named_in_one_line(name, nested, tmp_path):
    content, message = REFUSED[name]
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps({"image_processor": content} if nested else content))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        pixels.preprocessing(tmp_path, PX)
    assert "\n" not in str(error.value) and file in str(error.value)


@pytest.mark.parametrize("content", ["{", "[" * 100_000], ids=["cut short", "nested too deeply"])
def test_a_damaged_file_is_named(content, tmp_path):
    for file in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text(content)
        with pytest.raises(ConfigError, match=rf"{file}' is no valid JSON"):
            pixels.preprocessing(tmp_path, PX)
        (tmp_path / file).unlink()
