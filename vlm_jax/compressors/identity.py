"""No compression: every patch becomes a visual token (the LLaVA-1.5 baseline once the projector follows)."""

from __future__ import annotations

import dataclasses

from vlm_jax.settings.model import CompressorConfig, Reference


@dataclasses.dataclass(frozen=True)
class IdentityConfig(CompressorConfig):
    name: str = dataclasses.field(default="identity", init=False)

    flax_module = "vlm_jax.compressors.modules.identity.Identity"
    reference = Reference()

    def num_tokens(self, grid: int) -> int:
        return grid**2
