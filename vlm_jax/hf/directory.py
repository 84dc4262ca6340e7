"""A model directory on disk: config.json, safetensors files, and the part of the model that each tensor belongs to.

Opening a directory reads the headers of its safetensors files only.

The same weight has several names: `vision_model.encoder...` in an encoder's own directory, `encoder...` in one that
transformers 5 saved, `vision_tower.vision_model.encoder...` in a LLaVA directory and
`model.vision_tower.vision_tower.vision_model.encoder...` in the original LLaVA layout. Likewise
`language_model.model.layers...` and `model.language_model.layers...` are `model.layers...`. `sort` gives each weight one
name within its part.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from vlm_jax.files import Path, to_path
from vlm_jax.hf import stored
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Weights of any framework. An export, which writes its own, does not copy them.
WEIGHTS = (*PICKLES, "*.safetensors", "*.safetensors.index.json", "*.h5", "*.msgpack", "*.gguf")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

VIT, LM, PROJECTOR, REFERENCE, OTHER = "vit", "lm", "projector", "reference", "other"

# (regex of a prefix, part, what replaces the prefix); the first match counts. REFERENCE holds compressor and projector
# together, as the original LLaVA and the compressors' releases store them; OTHER is known and not used by any of our parts.
PREFIXES: tuple[tuple[str, str, str], ...] = (
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", VIT, ""),
    (r"vision_model\.", VIT, ""),
    (r"(model\.)?multi_modal_projector\.", PROJECTOR, ""),
    (r"(model\.)?(mm_projector|query_abstractor)\.", REFERENCE, ""),
    (r"(model\.)?language_model\.lm_head\.", LM, "lm_head."),
    (r"(model\.)?language_model\.(model\.)?", LM, "model."),
    (r"(?=model\.|lm_head\.)", LM, ""),
    (r"(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)", VIT, ""),
    (r"(?=text_model\.|visual_projection\.|text_projection\.|logit_scale$|logit_bias$)", OTHER, ""),
)

Names = dict[str, str]  # the name within a part -> the name in the file


class Entry(NamedTuple):
    """A tensor of a file, by its header."""

    file: Path
    dtype: str  # a NumPy name
    shape: tuple[int, ...]


class Directory(NamedTuple):
    """A Hugging Face model directory."""

    path: Path
    tensors: dict[str, Entry]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """One tensor, or the rows [first, last) of it."""
        return stored.read(self.tensors[name].file, name, rows)


def is_model(path: str | Path) -> bool:
    """Whether there is a config.json as Hugging Face writes it. That of a training workdir has no model_type."""
    config = to_path(path) / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def open_directory(path: str | Path) -> Directory:
    """Raises ConfigError for a missing or damaged file, for pickled weights, and for a dtype that is no plain float."""
    folder = to_path(path)
    tensors: dict[str, Entry] = {}
    for file in _weight_files(folder):
        tensors |= _header(file, tensors)
    _check_index(folder, tensors)
    return Directory(folder, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The raw config.json. Raises ConfigError when there is none or it has no model_type."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{str(folder)!r} has no config.json; give a directory downloaded from the Hugging Face hub."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{str(folder / 'config.json')!r} has no model_type; it is no model's.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises ConfigError when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is no valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no JSON object; download it again.")
    return content


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return indexed_files(folder / INDEX)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    pickles.sort(key=lambda name: not name.startswith("pytorch_model"))
    if pickles:
        raise ConfigError(
            f"{str(folder)!r} has its weights in {pickles[0]} alone, a pickle, which can run code when it is read; convert it "
            f"first: python scripts/convert_hf.py --from-bin {folder} OUT (needs torch)."
        )
    raise ConfigError(f"{str(folder)!r} has no *.safetensors file; download the weights too.")


def weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of an index. Raises ConfigError when it has none, or names files elsewhere."""
    index = read_json(path)
    if not isinstance(index.get("weight_map"), dict):
        raise ConfigError(f"{str(path)!r} has no weight_map; download it again.")
    for name in index["weight_map"].values():
        if to_path(name).name != name:
            raise ConfigError(f"{str(path)!r} names {name!r}, outside its directory.")
    return index["weight_map"]


def indexed_files(path: Path) -> list[Path]:
    """The weight files that an index names. Raises ConfigError for those that are not there."""
    names = sorted(set(weight_map(path).values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(
            f"{str(path.parent)!r} lacks {len(missing)} of {len(names)} weight files of {path.name}: "
            f"{', '.join(missing[:5])}{more}; download them again."
        )
    return [path.parent / name for name in names]


def _header(file: Path, before: dict[str, Entry]) -> dict[str, Entry]:
    try:
        tensors = stored.header(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{str(file)!r} is truncated or damaged ({error}); download it again."
        ) from None
    for name, (dtype, _) in tensors.items():
        if name in before:
            raise ConfigError(f"{name} stands in {before[name].file.name} and in {file.name}.")
        if dtype not in DTYPES and not dtype.startswith(("I", "U", "B")):
            raise ConfigError(
                f"{str(file)!r}: {name} has dtype {dtype}; allowed: {', '.join(DTYPES)}. Dequantise it first."
            )
    return {name: Entry(file, DTYPES.get(d, d), shape) for name, (d, shape) in tensors.items()}


def _check_index(folder: Path, tensors: dict[str, Entry]) -> None:
    """Raises ConfigError unless every tensor is in the file that the index names, and no other tensor is there."""
    if not (folder / INDEX).is_file():
        return
    listed = weight_map(folder / INDEX)
    wrong = [n for n, file in listed.items() if n not in tensors or tensors[n].file.name != file]
    wrong += [n for n in tensors if n not in listed]
    if wrong:
        raise ConfigError(
            f"{str(folder / INDEX)!r} and the files disagree about {', '.join(sorted(wrong)[:5])}"
            f"{' ...' if len(wrong) > 5 else ''} ({len(wrong)} tensors); download them again."
        )


def sort(names: Iterable[str]) -> dict[str, Names]:
    """Tensor names by part. Raises ConfigError for a name that belongs to no part, and for a weight that is stored twice."""
    parts: dict[str, Names] = {VIT: {}, LM: {}, PROJECTOR: {}, REFERENCE: {}, OTHER: {}}
    unknown = []
    for name in names:
        for prefix, part, replacement in PREFIXES:
            match = re.match(prefix, name)
            if match:
                own = replacement + name[match.end() :]
                if own in parts[part]:
                    raise ConfigError(f"{parts[part][own]} and {name} are the same weight twice.")
                parts[part][own] = name
                break
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(f"tensors of no known part of a model: {listed(unknown)}.")
    return parts


def listed(names: Iterable[str], most: int = 12) -> str:
    """The first `most` names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def short(value: Any, most: int = 60) -> str:
    """The repr of `value` for an error message, cut after `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


@functools.cache
def say_once(line: str, level: int = logging.INFO) -> None:
    """Logs a line once per process, because a directory is read again for each of its parts."""
    log.log(level, line)
