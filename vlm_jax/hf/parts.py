"""The parts of our model in a model directory: which rules read which of its tensors."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from flax.traverse_util import flatten_dict

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.files import Path
from vlm_jax.hf import directory, io, maps
from vlm_jax.hf.directory import Directory, Names
from vlm_jax.hf.io import Sources, Tree
from vlm_jax.hf.maps import Rule
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig


def group_rules(opened: Directory, names: dict[str, Names], config: VLMConfig) -> dict[str, list[Rule]]:  # fmt: skip
    """The rules of each group of tensors that a directory holds."""
    patch = names[directory.VIT].get("embeddings.patch_embedding.weight", "")
    flat = bool(patch) and len(opened.tensors[patch].shape) == 2
    fused = "model.layers.0.self_attn.qkv_proj.weight" in names[directory.LM]
    rules = {
        directory.VIT: maps.vit(config.vit, flat, config.compressor.uses_scores),
        directory.LM: maps.lm(config.lm, fused),
        directory.PROJECTOR: maps.projector(maps.LLAVA_PROJECTOR),
        directory.REFERENCE: reference_rules(config) if names[directory.REFERENCE] else [],
    }
    return {group: rules[group] for group in rules if names[group]}


def parts_of(groups: dict[str, list[Rule]]) -> set[str]:
    """The parts of our model that the rules make."""
    return {rule.path.split("/")[0] for rules in groups.values() for rule in rules}


def held(opened: Directory, config: VLMConfig) -> set[str]:
    """The parts of our model that a directory holds."""
    return parts_of(group_rules(opened, directory.sort(opened.tensors), config))


def most_fused(opened: Directory, config: VLMConfig) -> int:
    """The largest number of parameters that one tensor of a directory holds."""
    groups = group_rules(opened, directory.sort(opened.tensors), config)
    return max(len(own) for rules in groups.values() for own in io.by_tensor(rules).values())


def reference_rules(config: VLMConfig) -> list[Rule]:
    """Compressor and projector in the reference layout. Raises ConfigError for a compressor that has none."""
    if config.compressor.reference is None:
        stored = [name for name, entry in COMPRESSORS.items() if entry.reference]
        raise ConfigError(
            f"{config.compressor.name} has no reference layout; the compressors that have one: {', '.join(stored)}."
        )
    return maps.reference(
        config.compressor.reference, config.vit.width, config.compressor.num_heads, config.projector_layers
    )  # fmt: skip


def sources(opened: Directory, config: VLMConfig, wanted: Collection[str]) -> Sources:
    """Where each parameter of the wanted parts is stored. Raises ConfigError for a part that is not there."""
    names = directory.sort(opened.tensors)
    groups = group_rules(opened, names, config)
    held = parts_of(groups)
    for part in wanted:
        if part not in held:
            raise ConfigError(
                f"init: {str(opened.path)!r} holds no {part}; it holds {', '.join(sorted(held)) or 'nothing we know'}."
            )
    found: Sources = {}
    for group, rules in groups.items():
        if any(rule.path.split("/")[0] in wanted for rule in rules):
            found |= io.match(group, names[group], rules)
    return {path: source for path, source in found.items() if path.split("/")[0] in wanted}


def load_parts(path: str | Path, config: VLMConfig, abstract: Tree, some: bool = False) -> Tree:
    """The top-level parts of `abstract` (ShapeDtypeStructs with shardings) from a model directory, streamed.

    some: `abstract` may lack parameters of a part, which are then not read. Raises ConfigError, before anything is read, when
    the weights are not exactly those of the model.
    """
    opened = directory.open_directory(path)
    found = sources(opened, config, tuple(abstract))
    if some:
        leaves = flatten_dict(abstract, sep="/")
        found = {path: source for path, source in found.items() if path in leaves}
    if "lm" in abstract and config.lm.tied_embeddings:
        _check_tied(opened)
    return io.load(opened, found, abstract)


def _check_tied(opened: Directory) -> None:
    """Raises ConfigError when the embeddings are tied but a head is stored that differs from the embedding table."""
    names = directory.sort(opened.tensors)[directory.LM]
    if "lm_head.weight" not in names:
        return
    table, head = opened.read(names["model.embed_tokens.weight"]), opened.read(names["lm_head.weight"])  # fmt: skip
    if not np.array_equal(table, head):
        raise ConfigError(
            f"{str(opened.path)!r}: config.json ties the embeddings, but {names['lm_head.weight']} differs from the table; set "
            "tie_word_embeddings to false there."
        )
