"""The training loss: next-token cross-entropy, for elastic compressors over the numbers of visual tokens they train for."""

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
from vlm_jax.layers import constrain, on_shards
from vlm_jax.models.vlm import VLM, Inputs
from vlm_jax.settings.run import Experiment
from vlm_jax.training import optim

Tree = dict[str, Any]
Batch = Mapping[str, Array]
Scored = tuple[Array, dict[str, Array]]  # the loss, and scalars for the metrics


def next_token_loss(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over all supervised targets of the batch, in float32; logits t-1 predict token t.

    Every target has the same weight, whatever its row or device. The scalars are the number of targets and the accuracy: a
    target is a hit if its logit is the maximum, which the normaliser needs anyway (an argmax over 2,048 x 8,000 logits takes
    a CPU another 57 ms).
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
    """`next_token_loss` of the logits `hidden @ head`, of which only `chunk` positions per row are materialised at a time."""
    targets = jnp.roll(tokens, -1, axis=1)
    mask = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    # Gathers the width once; the loop over chunks would gather it for every chunk.
    head = constrain(head.astype(hidden.dtype), None, "vocab")
    total, hits = _summed(hidden, head, targets, mask, chunk)
    return _mean(total, hits, mask.sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(
    hidden: Array, head: Array, targets: Array, mask: Array, chunk: int
) -> tuple[Array, Array]:
    """The summed loss and the number of hits over the targets that `mask` selects."""
    total, hits, _, _ = _over_shards(hidden, head, targets, mask, chunk, (False, False))
    return total, hits


def _summed_forward(
    hidden: Any, head: Any, targets: Any, mask: Any, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """Computes the gradients together with the loss, while a chunk's logits exist; the backward pass only scales them.

    A head that is frozen, as in stage 1, gets no gradient.
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
    """(loss, hits, gradient of hidden, gradient of head), summed over shards once, after the loop over chunks."""
    rows = ("batch", None)
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
    """The sums of one shard. A gradient that is not wanted has width 0."""
    (rows, length, width), (_, vocab) = hidden.shape, head.shape
    chunk = min(chunk, length)
    beyond = -length % chunk

    def split(x: Array) -> Array:
        """[B T ..] as [chunks B chunk ..], padded with masked positions."""
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


def make_loss(exp: Experiment, attention: str = "xla") -> Callable[..., Scored]:
    """(trainable, batch, step, frozen) -> loss and scalars. attention: the decoder's kernel, see models.attention.

    trainable, frozen: parts of the parameters that `optim.merge` puts together; without `frozen`, all of them.

    For an elastic compressor the loss is either that of one number of visual tokens, drawn for the step, or the mean over
    all numbers it is trained for. The mean runs encoder, compressor and projector once and the decoder once per number, in
    turn; of each decoder pass only the inputs are saved for the backward pass.
    """
    config = compressors.for_training(exp.model)
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, attention=attention))
    model = VLM(config)
    counts = compressors.train_tokens(exp.model.compressor, config.vit.grid)

    chunk = exp.train.loss_chunk
    method = "states" if chunk else "logits"

    def score(output: Any, batch: Batch) -> Scored:
        tokens, mask = batch["tokens"], batch["loss_mask"]
        if chunk:
            hidden, head = output
            return chunked_next_token_loss(hidden, head, tokens, mask, chunk)
        return next_token_loss(output, tokens, mask)

    def plain(trainable: Tree, batch: Batch, step: Array, frozen: Tree | None = None) -> Scored:
        params, inputs = optim.merge(trainable, frozen or {}), Inputs.from_batch(batch)
        visual: Any = model.apply({"params": params}, inputs, method="encode_images")
        return score(model.apply({"params": params}, inputs, visual, method=method), batch)

    def drawn(trainable: Tree, batch: Batch, step: Array, frozen: Tree | None = None) -> Scored:
        # Unlike MQT-LLaVA, all processes and micro-batches use the same number, a function of the seed and the step.
        key = jax.random.fold_in(jax.random.key(exp.train.seed), step)
        count = jax.random.choice(key, jnp.array(counts))
        loss, scalars = plain(trainable, {**batch, "count": count}, step, frozen)
        return loss, scalars | {"visual_tokens": count}

    def averaged(trainable: Tree, batch: Batch, step: Array, frozen: Tree | None = None) -> Scored:
        params, inputs = optim.merge(trainable, frozen or {}), Inputs.from_batch(batch)
        visual: Any = model.apply({"params": params}, inputs, method="encode_images")
        if visual is None:
            return plain(trainable, batch, step, frozen)

        # Without checkpointing, four scales of a small model took 4.5 times the memory and 1.4 times the CPU time.
        @jax.checkpoint
        def shown(count: Array) -> Scored:
            part = config.compressor.module_class().show(visual, count)
            return score(model.apply({"params": params}, inputs, part, method=method), batch)

        return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(shown, jnp.array(counts)))

    if compressors.decoder_passes(exp.model) > 1:
        return averaged
    return drawn if len(counts) > 1 else plain
