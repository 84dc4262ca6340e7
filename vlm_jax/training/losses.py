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
from vlm_jax.settings.run import Experiment, logit_block
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
    tied: bool = False,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`next_token_loss` of the logits `hidden @ head`, computed for supervised positions alone, at most `chunk` per row at a time.

    tied: whether the head is a transposed table of embeddings; it is multiplied as the table, or the loop would copy it.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    mask = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    # Gathers the width once; the loop over chunks would gather it for every chunk.
    axes, names = ("vd", ("vocab", None)) if tied else ("dv", (None, "vocab"))
    head = constrain((head.T if tied else head).astype(hidden.dtype), *names)
    total, hits = _summed(hidden, head, targets, mask, chunk, axes)
    return _mean(total, hits, mask.sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(
    hidden: Array, head: Array, targets: Array, mask: Array, chunk: int, axes: str
) -> tuple[Array, Array]:
    """The summed loss and the number of hits over the targets that `mask` selects. axes: of the head, "dv" or "vd"."""
    total, hits, _, _ = _over_shards(hidden, head, targets, mask, chunk, axes, (False, False))
    return total, hits


def _summed_forward(
    hidden: Any, head: Any, targets: Any, mask: Any, chunk: int, axes: str
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """Computes the gradients together with the loss, while a chunk's logits exist; the backward pass only scales them.

    A head that is frozen, as in stage 1, gets no gradient.
    """
    wanted = (hidden.perturbed, head.perturbed)
    arrays = (hidden.value, head.value, targets.value, mask.value)
    total, hits, *grads = _over_shards(*arrays, chunk, axes, wanted)
    kept = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    return (total, hits), (kept[0], kept[1])


def _summed_backward(chunk: int, axes: str, grads: tuple, cotangents: tuple) -> tuple:
    scale = cotangents[0]
    hidden, head = (None if g is None else (g * scale).astype(g.dtype) for g in grads)
    return hidden, head, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _over_shards(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    chunk: int,
    axes: str,
    wanted: tuple[bool, bool],
) -> tuple[Array, Array, Array, Array]:
    """(loss, hits, gradient of hidden, gradient of head), summed over shards once, after the loop over chunks."""
    rows = ("batch", None)
    function = on_shards(
        functools.partial(_over_chunks, chunk=chunk, axes=axes, wanted=wanted),
        inputs=((*rows, None), (None, None), rows, rows),
        outputs=(rows, rows, (*rows, None), (*rows, None, None)),
    )
    total, hits, d_hidden, d_head = function(hidden, head, targets, mask)
    return total.sum(), hits.sum(), d_hidden, d_head.sum(axis=(0, 1)).astype(head.dtype)


def _over_chunks(
    hidden: Float[Array, "B T D"],
    head: Array,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int,
    axes: str,
    wanted: tuple[bool, bool],
) -> tuple[Float[Array, "1 1"], Int[Array, "1 1"], Float[Array, "B T _"], Array]:
    """The sums of one shard. A gradient that is not wanted has no elements.

    Supervised positions of all rows are collected block by block, and the loop ends with the last of them: what no target
    supervises, visual tokens and questions, costs nothing. Where the head learns on several devices, all blocks run.
    """
    rows, length, width = hidden.shape
    slots, size = rows * length, logit_block(chunk, rows, length, wanted[1])
    score = functools.partial(_score, head=head, axes=axes, wanted=wanted)
    states, labels, supervised = hidden.reshape(slots, width), targets.ravel(), mask.ravel()
    if size == slots:
        total, hits, d_states, d_head = score(states, labels, supervised)
        return total[None, None], hits[None, None], d_states.reshape(rows, length, -1), d_head[None, None]  # fmt: skip

    blocks, count = -(-slots // size), supervised.sum()
    (order,) = jnp.nonzero(supervised, size=blocks * size, fill_value=slots)

    # On TPUs a loop that may end early keeps a second copy of a head that learns: 1.4 GiB per chip for 14B on 256 chips.
    runs_all = wanted[1] and jax.sharding.get_abstract_mesh().size > 1

    def is_left(carry: tuple) -> Any:
        return carry[0] < blocks if runs_all else carry[0] * size < count

    def body(carry: tuple) -> tuple:
        number, total, hits, d_states, d_head = carry
        at = jax.lax.dynamic_slice(order, (number * size,), (size,))
        chosen, target = (x.at[at].get(mode="fill", fill_value=0) for x in (states, labels))
        loss, hit, d_block, d_more = score(chosen, target, at < slots)
        d_states = jax.lax.dynamic_update_slice(d_states, d_block, (number * size, 0))
        return number + 1, total + loss, hits + hit, d_states, d_head + d_more

    start = (
        jnp.int32(0), jnp.float32(0), jnp.int32(0),
        jnp.zeros((blocks * size, width if wanted[0] else 0), hidden.dtype),
        jnp.zeros(head.shape if wanted[1] else (0, 0), jnp.float32),
    )  # fmt: skip
    with jax.named_scope(f"at_most_{blocks}_turns"):  # read by `vlm_jax.aot`
        _, total, hits, d_states, d_head = jax.lax.while_loop(is_left, body, start)
    place = jnp.cumsum(supervised) - 1  # of each supervised position in `order`
    d_hidden = jnp.where(supervised[:, None], d_states[place], 0).reshape(rows, length, -1)
    return total[None, None], hits[None, None], d_hidden, d_head[None, None]


def _score(
    hidden: Float[Array, "N D"],
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
    *,
    head: Array,
    axes: str,
    wanted: tuple[bool, bool],
) -> tuple[Float[Array, ""], Int[Array, ""], Float[Array, "N _"], Array]:
    """(loss, hits, gradient of hidden, gradient of head) of one block."""
    logits = jnp.einsum(f"td,{axes}->tv", hidden, head, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    total = jnp.where(mask, normaliser - picked, 0.0).sum()
    hits = ((picked == logits.max(axis=-1)) & mask).sum()
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    d_logits = jnp.where(mask[:, None], jnp.exp(logits - normaliser[:, None]) - is_target, 0.0)
    d_logits = d_logits.astype(head.dtype)
    d_hidden = jnp.zeros((hidden.shape[0], 0), hidden.dtype)
    d_head = jnp.zeros((0, 0), jnp.float32)
    if wanted[0]:
        d_hidden = jnp.einsum(f"tv,{axes}->td", d_logits, head)
    if wanted[1]:
        d_head = jnp.einsum(f"td,tv->{axes}", hidden, d_logits, preferred_element_type=jnp.float32)
    return total, hits, d_hidden, d_head


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
            tied = config.lm.tied_embeddings
            return chunked_next_token_loss(hidden, head, tokens, mask, chunk, tied)
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
