"""Average pooling: each visual token is the mean of its stride x stride window. The baseline without parameters."""

from __future__ import annotations

import dataclasses

from vlm_jax.compressors.windowed import WindowedConfig
from vlm_jax.settings.model import Reference


@dataclasses.dataclass(frozen=True)
class PoolConfig(WindowedConfig):
    """Its FLOPs are additions alone, counted as 0."""

    name: str = dataclasses.field(default="pool", init=False)

    flax_module = "vlm_jax.compressors.modules.pool.Pool"
    reference = Reference()
