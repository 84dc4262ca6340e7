"""The loss in chunks, gradients in micro-batches: the same numbers as all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import sharding
from vlm_jax.data import pipeline
from vlm_jax.models.lm import _logits
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.training import losses, step

ROWS, LENGTH, WIDTH, VOCAB = 3, 13, 8, 29


def drawn(dtype="float32"):
    """Hidden states, head, tokens and a mask in which rows have 0, some and all targets."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    head = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), dtype)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    mask = rng.random((ROWS, LENGTH)) < 0.4
    mask[0], mask[1] = False, True
    return hidden, head, tokens, jnp.asarray(mask)


def whole(hidden, head, tokens, mask):
    return losses.next_token_loss(hidden @ head, tokens, mask)


def test_in_bfloat16_too_whole_logits_have_the_loss_of_chunks():
    """Both are summed and kept in float32: with logits rounded to bfloat16 the loss is off in the third digit."""
    hidden, head, tokens, mask = drawn("bfloat16")

    def direct(hidden, head):
        return losses.next_token_loss(_logits(hidden, head), tokens, mask)

    def chunked(hidden, head):
        return losses.chunked_next_token_loss(hidden, head, tokens, mask, 4)

    (want, told), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, head)
    (loss, scalars), made = jax.value_and_grad(direct, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert scalars["accuracy"] == told["accuracy"]
    for mine, theirs in zip(made, grads, strict=True):
        assert mine.dtype == theirs.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype("f4"), theirs.astype("f4"), rtol=2**-7, atol=1e-3)
    exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    np.testing.assert_allclose(_logits(hidden, head), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 13, 99])
def test_the_chunked_loss_and_its_gradients_are_those_of_whole_logits(chunk, tied):
    hidden, head, tokens, mask = drawn()

    def chunked(hidden, head):
        return losses.chunked_next_token_loss(hidden, head, tokens, mask, chunk, tied)

    def direct(hidden, head):
        return whole(hidden, head, tokens, mask)

    (want, told), grads = jax.value_and_grad(direct, (0, 1), has_aux=True)(hidden, head)
    (loss, scalars), made = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert scalars["tokens"] == told["tokens"] > 10
    np.testing.assert_allclose(scalars["accuracy"], told["accuracy"])
    for mine, theirs in zip(made, grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(chunked)(hidden, head)[0], want, rtol=1e-6)  # no gradient


@pytest.mark.parametrize("targets", [0, 1, 512, 513, 1500])
def test_logits_are_computed_in_as_many_blocks_as_the_targets_fill(targets, monkeypatch):
    """1,500 positions of three rows, in blocks of 512 whatever row they are of."""
    rng, turns, score = np.random.default_rng(targets), [], losses._score
    hidden = jnp.asarray(rng.normal(size=(3, 500, WIDTH)), jnp.float32)
    head = drawn()[1]
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 501)), jnp.int32)
    mask = np.zeros((3, 501), bool)
    chosen = rng.permutation(1500)[:targets]
    mask[chosen // 500, 1 + chosen % 500] = True  # the first token of a row is no target
    hidden = jnp.pad(hidden, ((0, 0), (0, 1), (0, 0)))  # nothing comes after the last

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: turns.append(1))
        return score(*args, **kwargs)

    monkeypatch.setattr(losses, "_score", counted)

    def chunked(hidden, head):
        return losses.chunked_next_token_loss(hidden, head, tokens, jnp.asarray(mask), 512)

    def direct(hidden, head):
        return whole(hidden, head, tokens, jnp.asarray(mask))

    (want, told), grads = jax.value_and_grad(direct, (0, 1), has_aux=True)(hidden, head)
    (loss, scalars), made = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
    jax.effects_barrier()
    assert len(turns) == -(-targets // 512)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert scalars["tokens"] == told["tokens"] == targets
    assert scalars["accuracy"] == told["accuracy"]
    for mine, theirs in zip(made, grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_head_that_does_not_learn_gets_no_gradient_and_its_product_is_not_computed():
    hidden, head, tokens, mask = drawn()

    def of(*parts):
        loss = lambda *args: losses.chunked_next_token_loss(*args, tokens, mask, 4)[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, parts))(hidden, head)).count("dot_general")

    assert (of(0, 1), of(0), of(1)) == (3, 2, 2)


def test_a_tied_head_is_multiplied_as_the_table_that_it_is():
    hidden, head, tokens, mask = drawn()

    def loss(hidden, table):
        return losses.chunked_next_token_loss(hidden, table.T, tokens, mask, 4, tied=True)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head.T).compile().as_text()
    assert f"f32[{VOCAB},{WIDTH}]" in compiled and f"f32[{WIDTH},{VOCAB}]" not in compiled


def test_chunked_logits_never_exist_whole():
    hidden, head, tokens, mask = drawn()
    loss = lambda h, w: losses.chunked_next_token_loss(h, w, tokens, mask, 4)[0]  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head))
    assert f"[{ROWS * 4},{VOCAB}]" in text
    for positions in (f"{ROWS},{LENGTH}", ROWS * LENGTH, ROWS * 16):
        assert f"[{positions},{VOCAB}]" not in text


def test_in_bfloat16_the_chunked_loss_keeps_float32_logits():
    hidden, head, tokens, mask = drawn("bfloat16")
    exact = whole(hidden.astype(jnp.float32), head.astype(jnp.float32), tokens, mask)[0]
    found = losses.chunked_next_token_loss(hidden, head, tokens, mask, 4)[0]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "data")


def gradients(folder, trainable="^(compressor|projector|lm)/", **train):
    """Loss, scalars and gradients of one batch of the tiny run from the same parameters."""
    config = tiny.config(folder, **train)
    config.optim.trainable = trainable
    exp = experiment.resolve(config)
    p = step.plan(exp, sharding.make_mesh(exp.mesh), 4)
    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    batch = sharding.put(next(iterator), p.mesh)
    iterator.close()
    with sharding.use(p.mesh):
        state = step.fresh_state(p)
        (loss, scalars), grads = jax.jit(step.make_gradients(p))(
            state.trainable, batch, state.step, state.frozen
        )
    return loss, scalars, grads


@pytest.fixture(scope="module")
def at_once(folder):
    """Loss, scalars and gradients without chunks and micro-batches."""
    return gradients(folder, loss_chunk=0)


@pytest.mark.parametrize("train", [{}, dict(loss_chunk=5), dict(micro_batches=2), dict(micro_batches=4, loss_chunk=8)])  # fmt: skip
def test_chunks_and_micro_batches_change_no_gradient(folder, at_once, train):
    loss, scalars, grads = at_once
    mine, told, made = gradients(folder, **train)
    np.testing.assert_allclose(mine, loss, rtol=1e-6)
    assert told["tokens"] == scalars["tokens"]
    np.testing.assert_allclose(told["accuracy"], scalars["accuracy"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), made, grads)


def test_a_batch_that_micro_batches_do_not_divide_is_refused(folder):
    with pytest.raises(ConfigError, match=r"batch_size 4 .* \* train.micro_batches 3; use a multiple of 3"):  # fmt: skip
        gradients(folder, micro_batches=3)
    with pytest.raises(ConfigError, match="micro_batches must be positive, got 0"):
        gradients(folder, micro_batches=0)
    with pytest.raises(ConfigError, match=r"loss_chunk must be 0 .* got -1"):
        gradients(folder, loss_chunk=-1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_every_optimiser_learns_with_a_small_state(folder, optimizer):
    config = tiny.config(folder, num_steps=60, micro_batches=2, loss_chunk=8)
    config.optim.update(optimizer=optimizer, momentum_dtype="bfloat16", weight_decay=1e-4)
    exp = experiment.resolve(config)
    p = step.plan(exp, sharding.make_mesh(exp.mesh), 60)
    iterator = pipeline.train_iterator(exp.data, 1, exp.model.vit)
    batch, update, found = sharding.put(next(iterator), p.mesh), step.make_step(p), []
    iterator.close()
    with sharding.use(p.mesh):
        state = step.fresh_state(p)
        for _ in range(60):
            state, scalars = update(state, batch)
            found.append(float(scalars["loss"]))
    assert found[-1] < found[0] / 2 and update._cache_size() == 1
    sizes = [x.nbytes for x in jax.tree.leaves(state.opt_state)]
    params = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    assert sum(sizes) < {"adamw": 1.6, "muon": 1.6, "adafactor": 1.2}[optimizer] * params
