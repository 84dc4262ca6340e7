"""What goes in and out of every compressor beside plain feature arrays."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class VisualTokens(NamedTuple):
    """Visual tokens of each image in M slots, of which some may be empty.

    A slot that is not valid holds any finite numbers; the decoder never sees it (models/vlm.py). Every image has at
    least one valid token.
    """

    tokens: Float[Array, "B M C"]
    valid: Bool[Array, "B M"] | None = None  # None: all of them
    # The place each token stands at: the row of the projector's table of positions. None: its own slot.
    places: Int[Array, "B M"] | None = None
    # Of a compressor that weighs patches by the question: each token's log-weight when tokens are pooled further.
    logits: Float[Array, "B M"] | None = None
