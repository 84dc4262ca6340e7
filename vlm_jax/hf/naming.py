"""Which part of the model a tensor belongs to, whatever the file calls it, and its one name there.

The same weight is `vision_model.encoder...` in a tower's own directory, `encoder...` in one that transformers 5 saved,
`vision_tower.vision_model.encoder...` in a LLaVA directory and `model.vision_tower.vision_tower.vision_model.encoder...`
in the original LLaVA layout; `language_model.model.layers...` and `model.language_model.layers...` are `model.layers...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vlm_jax.settings.checks import ConfigError

VIT, LM, PROJECTOR, REFERENCE, OTHER = "vit", "lm", "projector", "reference", "other"

# (prefix, part, what stands for the prefix): the first that matches counts. REFERENCE is compressor and projector in one,
# as the original LLaVA and the compressors' releases store them; OTHER is known and never needed.
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

Names = dict[str, str]  # the one name -> the name in the file


def sort(names: Iterable[str]) -> dict[str, Names]:
    """Tensor names by part. Raises ConfigError for names of no part, and for two names of one weight."""
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
    """The names in order, with the count of those beyond the first `most`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
