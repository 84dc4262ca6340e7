"""Parameters to a directory that transformers loads. An error leaves no partial directory.

`standalone` writes names and settings of its own:

    llava       the whole model, where the compressor is `identity`
    lm, vit     the decoder or the encoder alone, with any compressor
    reference   compressor and projector in the original layout (model.mm_projector...), for the compressors' releases

`onto_base` replaces the parameters of a directory that the model was imported from. Names, dtypes, files, settings and the
tensors that our model does not use stay, so that import then export is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16)
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from vlm_jax.files import Path, copy, local_copy, whole_folder, write_whole
from vlm_jax.hf import directory, io, maps, parts, written
from vlm_jax.hf.describe import check_agrees, check_same_model
from vlm_jax.hf.maps import Rule
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.hub import TOKENIZER_FILES
from vlm_jax.settings.model import VLMConfig

Tree = dict[str, Any]
WHAT = {"llava": ("vit", "projector", "lm"), "lm": ("lm",), "vit": ("vit",), "reference": ("compressor", "projector")}  # fmt: skip
SHARD_BYTES = 5_000_000_000

# what -> (group of tensors -> the prefix of their names)
PREFIXES = {
    "llava": {directory.VIT: "vision_tower.vision_model.", directory.PROJECTOR: "multi_modal_projector.", directory.LM: "language_model."},
    "lm": {directory.LM: ""},
    "vit": {directory.VIT: "vision_model."},
    "reference": {directory.REFERENCE: "model.mm_projector."},
}  # fmt: skip


class Companions(NamedTuple):
    """The files beside the weights in a directory made without a base; None: not written."""

    tokenizer: Path | None  # directory of a Hugging Face tokenizer
    chat_template: str | None  # Jinja
    image_mode: str | None  # data.image_mode


def standalone(
    out: Path,
    what: str,
    params: Tree,
    config: VLMConfig,
    companions: Companions,
    dtype: str = "",
    encoder_name: str = "",
) -> None:
    """Writes the directory `out`, which must not exist or be empty.

    what: a key of WHAT; params: its parts, whose leaves may be storage.streamed's. dtype: of the stored tensors; "" = the
    parameters'. encoder_name: the encoder's name in config.json of the reference layout. Raises ConfigError for a model that the
    layout cannot hold.
    """
    with whole_folder(out) as partial:
        ids, image_id = _write_tokenizer(partial, companions, image=what == "llava")
        settings = _settings(what, config, ids, image_id, encoder_name)
        rows = settings["text_config"]["vocab_size"] if what == "llava" else 0
        named = _named(what, params, config)
        stored = ((name, _grown(name, tensor, rows)) for name, tensor in named)
        settings["torch_dtype"] = _write_shards(partial, stored, dtype)
        _write_json(partial / "config.json", settings)
        if what in ("llava", "vit") and companions.image_mode is not None:
            pixels = written.preprocessor(config.vit, companions.image_mode)
            _write_json(partial / "preprocessor_config.json", pixels)
        if what == "llava":
            _write_json(partial / "processor_config.json", written.processor(config.vit))


def _settings(
    what: str, config: VLMConfig, ids: dict[str, int], image_id: int, encoder_name: str
) -> dict[str, Any]:
    """config.json."""
    if what == "vit":
        return written.encoder(config.vit)
    if what == "lm":
        return written.decoder(config.lm) | ids
    if what == "reference":
        return written.original(config, encoder_name) | ids
    settings = written.llava(config, image_id)
    # The image token needs a row, although it is never looked up.
    rows = max(config.lm.vocab_size, image_id + 1)
    settings["text_config"] |= {**ids, "vocab_size": rows}
    return settings


def _named(what: str, params: Tree, config: VLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, tensor) of everything to be stored."""
    prefixes = PREFIXES[what]
    layout = config.compressor.reference
    if what == "reference" and layout:
        prefixes = {directory.REFERENCE: f"model.{layout.module}."}
    rules: dict[str, list[Rule]] = {
        directory.VIT: maps.vit(config.vit, flat_patches=False, scores=False), directory.LM: maps.lm(config.lm, fused=False),
        directory.PROJECTOR: maps.projector(maps.LLAVA_PROJECTOR),
        directory.REFERENCE: parts.reference_rules(config) if what == "reference" else [],
    }  # fmt: skip
    _check_all_stored(params, [rule for group in prefixes for rule in rules[group]])
    for group, prefix in prefixes.items():
        for name, tensor in io.tensors(params, rules[group]):
            yield prefix + name, tensor
        if group == directory.VIT and not (config.vit.post_norm and config.vit.feature_layer == -1):
            # transformers requires this norm, of a state that is not used: write the identity.
            width = config.vit.width
            yield f"{prefix}post_layernorm.weight", np.ones(width, np.float32)
            yield f"{prefix}post_layernorm.bias", np.zeros(width, np.float32)


def _check_all_stored(params: Tree, rules: list[Rule]) -> None:
    """Raises ConfigError for parameters that the layout has no tensor for."""
    stored = {rule.path for rule in rules}
    lost = [path for path in flatten_dict(params, sep="/") if path not in stored]
    # These belong to PruMerge only and have no stored form.
    lost = [path for path in lost if not path.startswith("vit/next_layer/")]
    if lost:
        raise ConfigError(f"export: this layout has no place for {directory.listed(lost)}.")


def _grown(name: str, tensor: np.ndarray, rows: int) -> np.ndarray:
    """Embedding table and head with rows for new tokens: the mean of the others, so that a new token is never the likeliest."""
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")) or len(tensor) >= rows:
        return tensor
    mean = tensor.astype(np.float32).mean(axis=0, keepdims=True).astype(tensor.dtype)
    return np.concatenate([tensor, np.repeat(mean, rows - len(tensor), axis=0)])


def _write_tokenizer(out: Path, companions: Companions, image: bool) -> tuple[dict[str, int], int]:
    """(bos, eos and pad ids for config.json, the id of IMAGE_TOKEN) after saving the tokenizer."""
    if companions.tokenizer is None:
        if image:
            raise ConfigError("export: a LLaVA directory needs a tokenizer; give --tokenizer=DIR.")
        return {}, 0
    from transformers import AutoTokenizer  # seconds to import

    place = local_copy(companions.tokenizer, TOKENIZER_FILES)
    tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
    if image:
        tokenizer.add_tokens([written.IMAGE_TOKEN], special_tokens=True)
    if companions.chat_template is not None:
        tokenizer.chat_template = companions.chat_template
    tokenizer.save_pretrained(out)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}  # fmt: skip
    known = {name: value for name, value in ids.items() if value is not None}
    return known, tokenizer.convert_tokens_to_ids(written.IMAGE_TOKEN) if image else 0


def _write_shards(out: Path, stored: Iterator[tuple[str, np.ndarray]], dtype: str) -> str:
    """Writes files of at most SHARD_BYTES (or of one tensor), and an index if there are several. Returns the stored dtype."""
    shards: list[dict[str, np.dtype]] = []
    current: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(current, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.dtype for name, tensor in current.items()})
        current.clear()

    for name, tensor in stored:
        tensor = _as(tensor, dtype)
        if current and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        current[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (out / "shard-0").replace(out / directory.SINGLE)
    else:
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (out / f"shard-{i}").replace(out / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / directory.INDEX, index)
    dtypes = {str(dtype) for names in shards for dtype in names.values()}
    return "float32" if "float32" in dtypes and not dtype else dtype or min(dtypes)


def _as(tensor: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(tensor.astype(dtype) if dtype else tensor)


def onto_base(out: Path, base: Path, params: Tree, config: VLMConfig) -> None:
    """Writes `out` as a copy of the directory `base` with its parameters replaced by `params`.

    params: at least the parts that the base holds; leaves may be storage.streamed's. A file of the base is in memory at a
    time. Raises ConfigError when the base's settings or shapes are others.
    """
    opened = directory.open_directory(base)
    names = directory.sort(opened.tensors)
    groups = parts.group_rules(opened, names, config)
    check_same_model(str(base), config)
    for part in parts.parts_of(groups):
        check_agrees(str(base), part, config)
    _check_all_stored(params, [rule for rules in groups.values() for rule in rules])
    ours: dict[
        str, tuple[str, list[Rule]]
    ] = {}  # name in the base -> (name within its part, rules)
    for group, rules in groups.items():
        io.match(group, names[group], rules)
        made = io.by_tensor(rules)
        ours |= {names[group][name]: (name, pieces) for name, pieces in made.items()}

    def make(name: str) -> np.ndarray:
        if name not in ours:
            return opened.read(name)
        entry, (own, rules) = opened.tensors[name], ours[name]
        tensor = io.tensor(params, rules, own)
        if tensor.shape != entry.shape:
            raise ConfigError(
                f"export: {name} has shape {list(tensor.shape)}, in the base {list(entry.shape)}."
            )
        return _as(tensor, entry.dtype)

    files: dict[Path, list[str]] = {}
    for name, entry in opened.tensors.items():
        files.setdefault(entry.file, []).append(name)
    with whole_folder(out) as partial:
        for file, wanted in files.items():
            # By parameter: one is in memory at a time, and it holds all layers of its tensors.
            wanted.sort(key=lambda name: ours[name][1][0].path if name in ours else "")
            save_file({n: make(n) for n in wanted}, partial / file.name, metadata={"format": "pt"})
        for path in sorted(base.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in directory.WEIGHTS):
                copy(path, partial / path.name)
        if (base / directory.INDEX).is_file():
            copy(base / directory.INDEX, partial / directory.INDEX)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
