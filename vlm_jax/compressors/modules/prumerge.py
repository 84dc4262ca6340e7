"""PruMerge and PruMerge+ (Shang et al. 2024, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge): keep the patches that the class
token looks at, and merge into each the patches that look like it.

    query, keys -> softmax -> a [B P] -> kept patches, the rest
    keys        -> cosine  -> the `neighbours` patches nearest to each kept one
    token of a kept patch = its feature + sum of a_j x neighbour j;   one more token = sum of a_j x feature j over the rest

PruMerge+ also keeps every so-many-th patch, whatever its score. There are no parameters: every token is a weighted sum of
patches, and those weights are the whole result. `prune_ratio` says how many patches the score keeps:

    adaptive  those whose score is an outlier among the image's own (above the third quartile + 1.5 interquartile ranges)
    batch     the mean number of outliers of the batch's images, for each of them
    fixed     fixed_ratio of the patches, the same number for every image

Differs from 42Shawn/LLaVA-PruMerge: "batch" is its adaptive mode, whose result for an image depends on the others; ours
never keeps nothing (there, an image without outliers leaves one token, and PruMerge+ divides by zero); the last patch may
be sampled (there, never: sample_last=False); the grid is free (there 24); without a class token the mean query of all
patches asks, because SigLIP has none (there CLIP alone).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.compressors.prumerge import PruMergeConfig
from vlm_jax.layers import Scores


class Chosen(NamedTuple):
    """What is kept of each image, in R slots, of which the first ones are filled. Beside examples for 6 patches, R = 4."""

    kept: Int[Array, "B R"]  # 4 1 0 3    patches, in the order of the tokens
    valid: Bool[Array, "B R"]  # 1 1 1 0    the last slot is empty
    rest: Bool[Array, "B P"]  # 0 0 1 1 0 1


class PruMerge(nn.Module):
    """Sows the weights [B M P] of the patches in each token as intermediates/weights (nothing is kept unless asked for)."""

    config: PruMergeConfig
    grid: int

    def __call__(
        self,
        last: Float[Array, "B P C"],
        taps: Float[Array, "B P Z"],
        query: None,
        scores: Scores,
    ) -> VisualTokens:
        """The question and the tapped states are not looked at. valid is None where the number of tokens is fixed."""
        cfg = self.config
        a = attention(scores)
        chosen = choose(a, cfg, self.grid)
        weights = token_weights(scores.keys, a, chosen, cfg.neighbours)
        self.sow("intermediates", "weights", weights)
        self.sow("intermediates", "chosen", chosen)
        tokens = jnp.einsum(
            "bmp,bpc->bmc",
            weights.astype(cfg.dtype),
            last.astype(cfg.dtype),
            preferred_element_type=jnp.float32,
        ).astype(cfg.dtype)
        places = jnp.pad(chosen.kept, ((0, 0), (0, 1)), constant_values=self.grid**2)
        if cfg.prune_ratio == "fixed":
            return VisualTokens(tokens, places=places)
        valid = jnp.pad(chosen.valid, ((0, 0), (0, 1)), constant_values=True)
        return VisualTokens(tokens, valid, places)


# --- scores -----------------------------------------------------------------------------------------------------------


def attention(scores: Scores) -> Float[Array, "B P"]:
    """How much the class token looks at each patch: one head of the whole width, in float32.

    Only its row of the attention matrix is computed. It looks at itself too, so that the patches share less than 1.
    """
    query, keys, class_key = scores
    if class_key is not None:
        keys = jnp.concatenate([class_key[:, None], keys], axis=1)
    logits = jnp.einsum("bc,bpc->bp", query, keys, preferred_element_type=jnp.float32)
    a = jax.nn.softmax(logits / math.sqrt(query.shape[-1]), axis=-1)
    return a if class_key is None else a[:, 1:]


def outliers(a: Float[Array, "*B P"]) -> Int[Array, "*B"]:
    """How many values of the last axis lie above its third quartile + 1.5 interquartile ranges: a quarter at most."""
    q1, q3 = jnp.quantile(a, jnp.array([0.25, 0.75]), axis=-1, keepdims=True)
    return (a > q3 + 1.5 * (q3 - q1)).sum(axis=-1)


# --- which patches are kept -------------------------------------------------------------------------------------------


def choose(a: Float[Array, "B P"], cfg: PruMergeConfig, grid: int) -> Chosen:
    """a: scores."""
    if cfg.prune_ratio == "fixed":
        return _choose_fixed(a, cfg)
    if cfg.prune_ratio == "batch":
        count = jnp.broadcast_to(outliers(a.reshape(-1)) // len(a), len(a))
    else:
        count = outliers(a)
    return _choose_adaptive(a, count, cfg, grid)


def _choose_fixed(a: Float[Array, "B P"], cfg: PruMergeConfig) -> Chosen:
    """A patch that is sampled and scores high stands in `kept` twice; for each such repeat the first patch of the rest is
    left out, so that both together always count P (as in the release)."""
    patches = a.shape[1]
    kept = jax.lax.top_k(a, math.floor(patches * cfg.fixed_ratio))[1]
    if cfg.samples:
        sampled = jnp.array(cfg.fixed_samples(patches), kept.dtype)
        kept = jnp.concatenate([kept, jnp.broadcast_to(sampled, (len(a), len(sampled)))], axis=1)
    missing = (kept[:, :, None] != jnp.arange(patches)).all(axis=1)
    surplus = missing.sum(axis=1, keepdims=True) - (patches - kept.shape[1])
    rest = missing & (jnp.cumsum(missing, axis=1) > surplus)
    return Chosen(kept, jnp.ones(kept.shape, bool), rest)


def _choose_adaptive(
    a: Float[Array, "B P"], count: Int[Array, "B"], cfg: PruMergeConfig, grid: int
) -> Chosen:
    """count: outliers of each image. An image that would need more than the slots there are keeps fewer of them, and
    PruMerge+ samples as sparsely as if it had only those."""
    patches, slots = a.shape[1], cfg.num_kept(grid)
    needed = cfg.adaptive_needs(patches)
    fitting = [n for n in range(1, len(needed) + 1) if needed[n - 1] <= slots]
    largest = [max(n for n in fitting if n <= max(count, 1)) for count in range(len(needed) + 1)]
    n = jnp.array(largest)[count][:, None]
    place = jnp.arange(patches)
    rank = jnp.argsort(jnp.argsort(-a, axis=1), axis=1)
    top = rank < n
    sampled = jnp.zeros_like(top)
    if cfg.samples:
        sampled = (place % (patches // n // 3) == 0) & (place < cfg.end_of_samples(patches))
    # The order of the tokens: the top by falling score, the samples from top left to bottom right; then what is not kept.
    later = place + jnp.where(sampled, patches, 2 * patches)
    order = jnp.argsort(jnp.where(top, rank, later), axis=1)
    kept = top | sampled
    valid = jnp.arange(slots) < kept.sum(axis=1, keepdims=True)
    return Chosen(order[:, :slots], valid, ~kept)


# --- what is merged ---------------------------------------------------------------------------------------------------


def token_weights(
    keys: Float[Array, "B P C"], a: Float[Array, "B P"], chosen: Chosen, neighbours: int
) -> Float[Array, "B M P"]:
    """Each token as weights of the patches: 1 for its own and a_j for the neighbours; the last one, a_j for the rest.

    Neighbours are looked for among the other kept patches and the rest, by cosine of the keys. Those in empty slots of
    `chosen` are not among them, and the weights of an empty slot mean nothing.
    """
    kept, valid, rest = chosen
    batch, slots = kept.shape
    patches = a.shape[1]
    keys = keys.astype(jnp.float32)
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    centres = jnp.take_along_axis(unit, kept[:, :, None], axis=1)
    to_patches = jnp.einsum("brc,bpc->brp", centres, unit)
    to_kept = jnp.take_along_axis(to_patches, kept[:, None, :], axis=2)
    # The pool: the kept patches, slot by slot and without the slot itself, then all patches, of which the rest count.
    cosine = jnp.concatenate([to_kept, to_patches], axis=2)
    member = jnp.concatenate([valid, rest], axis=1)[:, None] & ~jnp.eye(
        slots, slots + patches, dtype=bool
    )
    place = jnp.concatenate([kept, jnp.broadcast_to(jnp.arange(patches), a.shape)], axis=1)
    near = jax.lax.top_k(jnp.where(member, cosine, -jnp.inf), neighbours)[1]
    near = jnp.take_along_axis(place[:, None], near, axis=2)  # [B R neighbours], patches
    image, row = jnp.ogrid[:batch, :slots]
    gains = jnp.take_along_axis(a[:, None], near, axis=2)
    own = jnp.zeros((batch, slots, patches)).at[image, row, kept].set(1.0)
    merged = own.at[image[..., None], row[..., None], near].add(gains)
    return jnp.concatenate([merged, jnp.where(rest, a, 0.0)[:, None]], axis=1)
