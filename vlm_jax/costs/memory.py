"""Bytes a model takes on a chip: its weights part by part, and a bound on what a pass keeps beside them.

Norms and biases of the encoder and the projector are left out: 0.1 % of a model. 2 bytes a value unless told.
"""

from __future__ import annotations

import dataclasses

from vlm_jax.costs.chips import VALUE_BYTES
from vlm_jax.costs.flops import encoder_maps
from vlm_jax.settings.model import VLMConfig


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes of each part; query_layers: of the decoder layers that read the question alone."""

    encoder: int
    query_layers: int
    compressor: int
    projector: int
    layers: int
    head: int
    table: int  # the embedding table, of which a pass reads a few rows; 0 when it is the head

    @property
    def stored(self) -> int:
        """All of them, each once."""
        parts = (self.encoder, self.compressor, self.projector, self.layers, self.head, self.table)
        return sum(parts)


def weight_bytes(config: VLMConfig, value_bytes: int = VALUE_BYTES) -> Weights:
    """What the parts of a model take; the encoder's layers after the feature layer are not stored."""
    vit, lm = config.vit, config.lm
    compressor = config.compressor
    layer = sum(encoder_maps(vit).values())
    positions = ((vit.position_grid or vit.grid) ** 2 + vit.cls_token) * vit.width
    encoder = vit.feature_state * layer + 3 * vit.patch_px**2 * vit.width + positions
    if compressor.uses_scores and vit.feature_layer < -1:
        encoder += 2 * vit.width**2  # queries and keys of the layer after the feature
    maps = 0 if compressor.place == "instead" else config.projector_layers
    projector = bool(maps) * (vit.width * lm.width + (maps - 1) * lm.width**2)
    asked = compressor.query_layers if compressor.uses_query else 0
    share = (lm.num_layers if asked == -1 else asked) / lm.num_layers
    table = lm.vocab_size * lm.width
    return Weights(
        encoder=value_bytes * encoder,
        query_layers=round(value_bytes * share * lm.non_embedding_params),
        compressor=value_bytes * compressor.num_params(vit.width, lm.width),
        projector=value_bytes * projector,
        layers=value_bytes * lm.non_embedding_params,
        head=value_bytes * table,
        table=0 if lm.tied_embeddings else value_bytes * table,
    )


def activation_bytes(
    config: VLMConfig,
    batch: int,
    prompt_tokens: int,
    cached_tokens: int = 0,
    value_bytes: int = VALUE_BYTES,
) -> int:
    """A bound on what one layer keeps at once, in the encoder or in the prefill, whichever is more.

    The residual stream twice, the widest of attention's and the MLP's inner values, the scores in float32 and once more as
    probabilities (a flash kernel keeps none), and the logits of one position in float32.
    """
    vit, lm = config.vit, config.lm
    rows = vit.num_patches + vit.cls_token
    scores = vit.num_heads * rows**2 * (4 + value_bytes)
    inner = max(4 * vit.width, 2 * vit.mlp_width)
    encoder = rows * (2 * vit.width + inner) * value_bytes + scores
    fresh = prompt_tokens - cached_tokens
    q, kv = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    scores = lm.num_heads * fresh * prompt_tokens * (4 + value_bytes)
    inner = max(2 * q + 2 * kv, 3 * lm.mlp_width)
    prefill = fresh * (2 * lm.width + inner) * value_bytes + scores + 4 * lm.vocab_size
    return batch * max(encoder, prefill)
