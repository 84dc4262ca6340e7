"""What a training step minimises: next-token cross-entropy, of elastic compressors over the numbers they train for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import compressors
from vlm_jax.compressors.modules.visual import Visual
from vlm_jax.layers import constrain, on_shards
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings.run import Experiment

Tree = dict[str, Any]
Batch = Mapping[str, Array]
Scored = tuple[Array, dict[str, Array]]  # the loss, and what is told beside it


def next_token_loss(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over the supervised targets of the whole batch, in float32; logits t-1 predict token t.

    Each target counts the same, on whichever device or in whichever row it is. Also: how many targets, how many hit (have
    the largest logit: the normaliser needs that one anyway, an argmax of 2,048 x 8,000 takes a CPU 57 ms more).
    """
    targets, mask = tokens[:, 1:], loss_mask[:, 1:]
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hits = (picked == logits.max(axis=-1)) & mask
    return _mean(jnp.where(mask, losses, 0.0).sum(), hits.sum(), mask.sum())


def _mean(total: Array, hits: Array, count: Array) -> tuple[Array, dict[str, Array]]:
    divisor = jnp.maximum(count, 1)
    return total / divisor, {"tokens": count, "accuracy": hits / divisor}


def chunked_next_token_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`next_token_loss` of the logits `hidden @ head`, of which only `chunk` positions per row exist at once."""
    targets = jnp.roll(tokens, -1, axis=1)
    mask = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    # The width is gathered here, once: inside the loop over chunks it would be gathered for each.
    head = constrain(head.astype(hidden.dtype), None, "vocab")
    total, hits = _summed(hidden, head, targets, mask, chunk)
    return _mean(total, hits, mask.sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(
    hidden: Array, head: Array, targets: Array, mask: Array, chunk: int
) -> tuple[Array, Array]:
    """The sum of the masked targets' losses, and how many are hit."""
    total, hits, _, _ = _over_shards(hidden, head, targets, mask, chunk, (False, False))
    return total, hits


def _summed_forward(
    hidden: Any, head: Any, targets: Any, mask: Any, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """The gradients are made beside the loss, while a chunk's logits exist: the backward pass only scales them.

    A head that does not learn, as in stage 1, gets none.
    """
    wanted = (hidden.perturbed, head.perturbed)
    arrays = (hidden.value, head.value, targets.value, mask.value)
    total, hits, *grads = _over_shards(*arrays, chunk, wanted)
    kept = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    return (total, hits), (kept[0], kept[1])


def _summed_backward(chunk: int, grads: tuple, cotangents: tuple) -> tuple:
    scale = cotangents[0]
    hidden, head = (None if g is None else (g * scale).astype(g.dtype) for g in grads)
    return hidden, head, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _over_shards(
    hidden: Array, head: Array, targets: Array, mask: Array, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Array, Array, Array, Array]:
    """(loss, hits, gradient of hidden, gradient of head); sums over shards wait until the loop over chunks is done."""
    rows = ("batch", "length")
    function = on_shards(
        functools.partial(_over_chunks, chunk=chunk, wanted=wanted),
        inputs=((*rows, None), (None, None), rows, rows),
        outputs=(rows, rows, (*rows, None), (*rows, None, None)),
    )
    total, hits, d_hidden, d_head = function(hidden, head, targets, mask)
    return total.sum(), hits.sum(), d_hidden, d_head.sum(axis=(0, 1)).astype(head.dtype)


def _over_chunks(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int,
    wanted: tuple[bool, bool],
) -> tuple[Float[Array, "1 1"], Int[Array, "1 1"], Float[Array, "B T _"], Float[Array, "1 1 _ V"]]:
    """One shard's sums; a gradient that is not wanted is of width 0."""
    (rows, length, width), (_, vocab) = hidden.shape, head.shape
    chunk = min(chunk, length)
    beyond = -length % chunk

    def split(x: Array) -> Array:
        """[B T ..] as [chunks B chunk ..], padded with what is masked."""
        x = jnp.pad(x, ((0, 0), (0, beyond), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(carry: tuple, chunks: tuple) -> tuple[tuple, Array]:
        total, hits, d_head = carry
        h, target, m = chunks
        logits = jnp.einsum("btd,dv->btv", h, head, preferred_element_type=jnp.float32)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        total += jnp.where(m, normaliser - picked, 0.0).sum()
        hits += ((picked == logits.max(axis=-1)) & m).sum()
        is_target = jnp.arange(vocab) == target[..., None]
        d_logits = jnp.where(m[..., None], jnp.exp(logits - normaliser[..., None]) - is_target, 0.0)
        d_logits = d_logits.astype(head.dtype)
        d_hidden = jnp.zeros((*m.shape, 0), h.dtype)
        if wanted[0]:
            d_hidden = jnp.einsum("btv,dv->btd", d_logits, head)
        if wanted[1]:
            d_head += jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (total, hits, d_head), d_hidden

    start = (
        jnp.float32(0),
        jnp.int32(0),
        jnp.zeros((width if wanted[1] else 0, vocab), jnp.float32),
    )
    (total, hits, d_head), d_hidden = jax.lax.scan(
        body, start, (split(hidden), split(targets), split(mask))
    )
    d_hidden = d_hidden.swapaxes(0, 1).reshape(rows, length + beyond, -1)[:, :length]
    return total[None, None], hits[None, None], d_hidden, d_head[None, None]


def make_loss(exp: Experiment, attention: str = "xla") -> Callable[[Tree, Batch, Array], Scored]:
    """(parameters, batch, step) -> loss and scalars. attention: the decoder's kernel, see models.attention.

    An elastic compressor either shows as many visual tokens as this step draws, or the loss is the mean over all numbers
    that it is trained for: encoder, compressor and projector run once, the decoder once per number, one after the other,
    and nothing of its passes is kept for the backward pass but their inputs.
    """
    config = compressors.for_training(exp.model)
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, attention=attention))
    model = VLM(config)
    counts = compressors.train_tokens(exp.model.compressor, config.vit.grid)

    def read(params: Tree, inputs: Inputs, visual: Visual | None, batch: Batch) -> Scored:
        target = batch["tokens"], batch["loss_mask"]
        if not exp.train.loss_chunk:
            logits: Any = model.apply({"params": params}, inputs, visual, method="read")
            return next_token_loss(logits, *target)
        states: Any = model.apply({"params": params}, inputs, visual, method="states")
        hidden, head = states
        return chunked_next_token_loss(hidden, head, *target, exp.train.loss_chunk)

    def plain(params: Tree, batch: Batch, step: Array) -> Scored:
        inputs = Inputs.from_batch(batch)
        visual: Any = model.apply({"params": params}, inputs, method="see")
        return read(params, inputs, visual, batch)

    def drawn(params: Tree, batch: Batch, step: Array) -> Scored:
        # Differs from MQT-LLaVA: every process and micro-batch draws the same number, from the seed and the step alone.
        key = jax.random.fold_in(jax.random.key(exp.train.seed), step)
        count = jax.random.choice(key, jnp.array(counts))
        loss, scalars = plain(params, {**batch, "count": count}, step)
        return loss, scalars | {"visual_tokens": count}

    def averaged(params: Tree, batch: Batch, step: Array) -> Scored:
        inputs = Inputs.from_batch(batch)
        visual: Any = model.apply({"params": params}, inputs, method="see")
        if visual is None:
            return plain(params, batch, step)

        # With the passes kept, four scales of a small model took 4.5 times the memory and 1.4 times the CPU time.
        @jax.checkpoint
        def shown(count: Array) -> Scored:
            part = config.compressor.module_class().show(visual.tokens, count)
            return read(params, inputs, part, batch)

        return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(shown, jnp.array(counts)))

    if compressors.decoder_passes(exp.model) > 1:
        return averaged
    return drawn if len(counts) > 1 else plain
