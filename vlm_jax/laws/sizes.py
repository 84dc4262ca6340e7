"""What counts as N: the table's own numbers, or each preset's size by name, with or without embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from vlm_jax.costs.price import Number
from vlm_jax.laws.table import Row
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig

GIVEN = "given"
COUNTS: dict[str, Callable[[LMConfig], Number]] = {
    "nominal": lambda lm: lm.nominal_params,  # as in the model's name: 7B
    "total": lambda lm: lm.total_params,
    "non-embedding": lambda lm: lm.non_embedding_params,
}
SIZES = (GIVEN, *COUNTS)


def counted(rows: Sequence[Row], size: str) -> list[Row]:
    """The rows with lm_params counted in this way; raises ConfigError for an LM that is no preset (but for "given")."""
    if size == GIVEN:
        return list(rows)
    params = {lm: _params(lm, size) for lm in dict.fromkeys(row.lm for row in rows)}
    return [dataclasses.replace(row, lm_params=params[row.lm]) for row in rows]


def _params(lm: str, size: str) -> Number:
    if lm not in presets.LM:
        raise ConfigError(
            f"fit: --size={size} needs presets, and lm {lm!r} is none; name one of {', '.join(presets.LM)} or use --size={GIVEN}."
        )
    params = COUNTS[size](presets.lm(lm))
    if not params:
        raise ConfigError(
            f"fit: preset {lm!r} has no {size} size; use --size=total, non-embedding or {GIVEN}."
        )
    return params
