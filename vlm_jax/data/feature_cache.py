"""The files of a cache of encoder features, and the check that a run may read it instead of its images.

FOLDER/last.npy [images P C]  taps.npy [images P Z] (only of compressors that tap)  index.json {relative image path: row}
       made.json {format, settings, taps, encoder, source}: what the features were made with

NumPy has no bfloat16, so such features are stored as their bits, uint16.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax import files
from vlm_jax.data.rows import make_pixels
from vlm_jax.files import Path, to_path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.settings.run import DataConfig

FORMAT = 1
MADE = "made.json"
AGAIN = "make a cache for this run (python -m vlm_jax.features), or set features_dir to ''"
NO_EFFECT = ("remat", "sharded")  # fields of the encoder that do not change its features


def stored(values: np.ndarray) -> np.ndarray:
    """Features as they are stored: bfloat16 as its bits, uint16."""
    return values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values


def settings(model: VLMConfig, data: DataConfig) -> dict[str, Any]:
    """Everything beside the weights that the features of an image depend on, by the name of the config's field."""
    pixels = dataclasses.asdict(make_pixels(data, model.vit))
    del pixels["max_pixels"]  # decides which images are refused, not the pixels of the others
    if pixels["decoder"] == "exact":  # not named by older caches
        del pixels["decoder"]
    vit = {k: v for k, v in dataclasses.asdict(model.vit).items() if k not in NO_EFFECT}
    found = {f"model.vit.{name}": value for name, value in vit.items()}
    found["data.image_mode"] = pixels.pop("mode")
    found |= {f"data.{name}": value for name, value in pixels.items() if name not in vit}
    return json.loads(json.dumps(found))  # tuples become lists, as in what is read back


def write_made(
    folder: Path,
    model: VLMConfig,
    data: DataConfig,
    taps: tuple[int, ...],
    encoder: str,
    source: str,
) -> None:
    """encoder: fingerprint of the weights. source: where they came from, shown in errors."""
    made = {"format": FORMAT, "settings": settings(model, data), "taps": taps, "encoder": encoder, "source": source}  # fmt: skip
    files.write_whole(folder / MADE, json.dumps(made, indent=1) + "\n")


def read_made(directory: str) -> dict[str, Any]:
    """What the features were made with. Raises ConfigError when `directory` is no cache of this format."""
    path = to_path(directory)
    for name in ("index.json", "last.npy", MADE):
        if not (path / name).is_file():
            raise ConfigError(f"features_dir: {directory!r} holds no {name}; {AGAIN}.")
    try:
        made = json.loads((path / MADE).read_text(encoding="utf-8"))
        if made["format"] != FORMAT:
            raise ConfigError(
                f"features_dir: {directory!r} has format {made['format']}, not {FORMAT}; {AGAIN}."
            )
        return {name: made[name] for name in ("settings", "taps", "encoder", "source")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"features_dir: {path / MADE} cannot be read; {AGAIN}.") from None


def check(directory: str, model: VLMConfig, data: DataConfig) -> None:
    """Raises ConfigError when the features were made with other settings than this run's, naming the first that differs."""
    before, now = read_made(directory)["settings"], settings(model, data)
    for name in now.keys() | before.keys():
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"features_dir: {directory!r} was made with {name} = {before.get(name)!r}, this run has "
                f"{now.get(name)!r}; {AGAIN}."
            )


def check_cacheable(model: VLMConfig) -> None:
    """Raises ConfigError when the compressor needs more of the encoder than a feature cache holds."""
    if model.compressor.uses_scores:
        raise ConfigError(
            f"features_dir: a cache has no queries and keys, which {model.compressor.name} looks at; use '' to encode the images."
        )
