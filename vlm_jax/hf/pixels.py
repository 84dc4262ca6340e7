"""A directory's image processor as settings of data/images.py: how a picture is squared and resized, its mean and std.

transformers writes the settings into preprocessor_config.json, or since version 5 into processor_config.json under
`image_processor`, which takes precedence. A field that is left out has the default of the processor's class.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vlm_jax.files import Path
from vlm_jax.hf.directory import read_json, say_once, short
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.presets import CLIP, SIGLIP

Json = Mapping[str, Any]

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIP: Json = dict(
    size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, do_center_crop=True, resample=3,
    image_mean=CLIP["mean"], image_std=CLIP["std"],
)  # fmt: skip
_SIGLIP: Json = dict(
    size={"height": 224, "width": 224}, do_center_crop=False, resample=3,
    image_mean=SIGLIP["mean"], image_std=SIGLIP["std"],
)  # fmt: skip
# transformers' class -> its defaults for the fields that are read
PROCESSORS: dict[str, Json] = {
    "CLIPImageProcessor": _CLIP, "LlavaImageProcessor": _CLIP, "SiglipImageProcessor": _SIGLIP,
}  # fmt: skip
# family of encoders -> the settings when a directory has no image processor
FAMILIES: dict[str, Json] = {
    "clip": _CLIP, "siglip": _SIGLIP, "siglip2": dict(_SIGLIP, resample=2),
}  # fmt: skip


def preprocessing(folder: Path, image_px: int, encoder: str = "") -> dict[str, Any]:
    """{"image_mode", "resample", "mean", "std"} of a directory whose encoder takes images of image_px.

    encoder: its model_type, "" = that of the directory's config.json; where the directory names no processor, the default of
    its family applies. Raises ConfigError for a processor or a step that data/images.py does not implement, and for a size
    other than the encoder's.
    """
    family = (encoder or _encoder_of(folder)).removesuffix("_vision_model")
    found = _settings(folder)
    if found is None:
        default = FAMILIES.get(family, _CLIP)
        mode = "crop" if default["do_center_crop"] else "stretch"
        say_once(
            f"{folder} has no image processor (preprocessor_config.json): images are prepared as by {family or 'clip'}'s "
            f"default (image_mode {mode}, {RESAMPLE[default['resample']]}).",
            logging.WARNING,
        )
        return _taken(default, mode)
    given, where = found
    name = _class_of(given, where)
    default = PROCESSORS[name] if name else _guessed(given, family)
    # Of a size or a number null means the default; of a step transformers takes it as false.
    said = {key: value for key, value in given.items() if value is not None or key[:3] == "do_"}
    settings = {**default, **said}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(step, True):
            given_as = "null" if settings[step] is None else "false"
            raise ConfigError(f"{where}: {step} is {given_as}; that step is always taken here.")
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
        raise ConfigError(f"{where}: rescale_factor {short(factor)} is not 1/255.")
    if settings["resample"] not in list(RESAMPLE):
        raise ConfigError(
            f"{where}: resample {short(settings['resample'])} is not 2 (bilinear) or 3 (bicubic)."
        )
    # Other processors ignore do_pad.
    padded = bool(settings.get("do_pad")) and name in ("LlavaImageProcessor", "")
    mode, side = _squaring(settings, padded, where)
    if side != image_px:
        raise ConfigError(f"{where}: images of {side} px, but the encoder takes {image_px} px.")
    for name in ("image_mean", "image_std"):
        if not all(isinstance(value, (int, float)) for value in _three(settings[name])):
            raise ConfigError(f"{where}: {name} {short(settings[name])} is not three numbers.")
    return _taken(settings, mode)


def _encoder_of(folder: Path) -> str:
    """The model_type of the image encoder that config.json describes; "" if it describes none."""
    if not (folder / "config.json").is_file():
        return ""
    config = read_json(folder / "config.json")
    own = config.get("vision_config") or {"model_type": "clip"} if config.get("model_type") == "llava" else config  # fmt: skip
    return str(own.get("model_type", ""))


def _taken(settings: Json, mode: str) -> dict[str, Any]:
    colours = {ours: _three(settings[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))}  # fmt: skip
    return {"image_mode": mode, "resample": RESAMPLE[settings["resample"]], **colours}


def _three(value: Any) -> tuple[Any, ...]:
    """A list of three as a tuple; any other value three times. `preprocessing` refuses what is no number."""
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 3 else (value,) * 3


def _settings(folder: Path) -> tuple[Json, str] | None:
    """(the image processor's settings, the file that holds them); None if no file does."""
    joint, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if joint.is_file():
        nested = read_json(joint).get("image_processor")
        if isinstance(nested, Mapping):
            return nested, f"{str(joint)!r}: image_processor"
    if not alone.is_file():
        return None
    found = read_json(alone)
    nested = found.get("image_processor")
    return (nested if isinstance(nested, Mapping) else found), repr(str(alone))


def _class_of(given: Json, where: str) -> str:
    """The processor's class, a key of PROCESSORS; "" if the file names none. Raises ConfigError for any other class."""
    name = given.get("image_processor_type") or given.get("feature_extractor_type") or ""
    code = given.get("auto_map")
    if not name and isinstance(code, Mapping) and code.get("AutoImageProcessor"):
        own = code["AutoImageProcessor"]
        name = str(own[0] if isinstance(own, list) else own).split(".")[-1]
    own = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Pil").removesuffix("Fast")  # fmt: skip
    if own and own not in PROCESSORS:
        raise ConfigError(
            f"{where}: {name} prepares images in a way that is not computed here; allowed: {', '.join(PROCESSORS)}."
        )
    for field, what in (("max_num_patches", "NaFlex: grids as wide as the picture"), ("min_pixels", "a size that changes")):  # fmt: skip
        if not own and given.get(field):
            raise ConfigError(
                f"{where}: {field} {short(given[field])} ({what}) is not computed here; only squares of one size are."
            )
    return own


def _guessed(given: Json, family: str) -> Json:
    """The defaults for a file that names no class: of the encoder's family, else of the class with this form of size."""
    squared = isinstance(given.get("size"), Mapping) and "height" in given["size"]
    return FAMILIES.get(family) or (_SIGLIP if squared and not given.get("crop_size") else _CLIP)


def _squaring(settings: Json, padded: bool, where: str) -> tuple[str, int]:
    """(data.image_mode, side in pixels): pad, crop the middle, or stretch."""
    height, width, edge = _size(settings["size"], where)
    crop = _size(settings.get("crop_size"), where, square=True) if settings["do_center_crop"] else (0, 0, 0)  # fmt: skip
    for high, wide, _ in ((height, width, edge), crop):
        if high != wide:
            raise ConfigError(f"{where}: {high}x{wide} px is no square.")
    cropped = crop[0]
    side = height or edge
    if edge and not cropped and not padded:
        raise ConfigError(f"{where}: shortest_edge without do_center_crop leaves no square.")
    if cropped and cropped != side:
        raise ConfigError(
            f"{where}: images are resized to {side} px and cropped to {cropped} px; only equal sizes are computed here."
        )
    return "pad" if padded else "crop" if edge else "stretch", side


def _size(size: Any, where: str, square: bool = False) -> tuple[int, int, int]:
    """(height, width, shortest edge) of a size in any of its forms; 0 for what is not given.

    square: a single number is the side of a square, not the shortest edge.
    """
    if isinstance(size, int):
        return (size, size, 0) if square else (0, 0, size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return size[0], size[1], 0
    if isinstance(size, Mapping):
        said = {key: value for key, value in size.items() if value is not None}
        if set(said) == {"height", "width"}:
            return said["height"], said["width"], 0
        if set(said) == {"shortest_edge"} and not square:
            return 0, 0, said["shortest_edge"]
    raise ConfigError(
        f"{where}: size {short(size)} is not computed here; use a number, height and width, or shortest_edge."
    )
