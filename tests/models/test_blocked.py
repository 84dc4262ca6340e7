"""Attention in blocks equals the softmax written out, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import blocked
from vlm_jax.models.blocked import blocked_attention

ROWS, LENGTH, HEADS, WIDTH = 2, 150, 4, 16  # two blocks of queries


def drawn(kv_heads, keys, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((LENGTH, HEADS), (keys, kv_heads), (keys, kv_heads))
    return [jnp.asarray(rng.normal(size=(ROWS, *s, WIDTH)), dtype) for s in shapes]


def causal(keys):
    """Causal, with holes: the first keys of row 1 are padding, and so is what follows query 5 of row 0 in key 3."""
    allowed = np.tril(np.ones((ROWS, LENGTH, keys), bool), k=keys - LENGTH)
    allowed[1, :, :7] = False
    allowed[0, 6:, 3] = False
    return jnp.asarray(allowed)


def written_out(q, k, v, allowed):
    mask = None if allowed is None else allowed[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keys, masked", [(LENGTH, True), (LENGTH + 20, True), (LENGTH, False), (90, False)])  # fmt: skip
def test_values_and_gradients_are_those_of_the_softmax_written_out(kv_heads, keys, masked):
    inputs, allowed = drawn(kv_heads, keys), causal(keys) if masked else None
    weights = np.random.default_rng(1).normal(size=(ROWS, LENGTH, HEADS, WIDTH))
    if masked:  # what a query without keys gets is not defined
        weights *= np.asarray(allowed.any(-1))[..., None, None]

    def of(attention):
        return jax.value_and_grad(lambda *x: (attention(*x, allowed) * weights).sum(), (0, 1, 2))(*inputs)  # fmt: skip

    assert LENGTH > blocked.MIN_QUERIES
    (found, made), (want, grads) = of(blocked_attention), of(written_out)
    np.testing.assert_allclose(found, want, rtol=1e-4)
    for mine, theirs in zip(made, grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_half_precision_is_as_close_to_float32_as_the_softmax_written_out():
    exact = written_out(*drawn(2, LENGTH), causal(LENGTH))
    half, allowed = drawn(2, LENGTH, jnp.bfloat16), causal(LENGTH)
    real = np.asarray(allowed.any(-1))
    apart = [np.abs(np.asarray(f(*half, allowed), np.float32) - exact)[real].max() for f in (blocked_attention, written_out)]  # fmt: skip
    assert apart[0] < 1.5 * apart[1]
    grads = jax.grad(lambda *x: blocked_attention(*x, allowed).astype(jnp.float32).sum(), (0, 1, 2))(*half)  # fmt: skip
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_a_query_without_keys_has_finite_values_and_gradients():
    inputs, allowed = drawn(2, LENGTH), causal(LENGTH)  # the first queries of row 1
    assert not allowed[1, 3].any()
    found = jax.value_and_grad(lambda *x: blocked_attention(*x, allowed).sum(), (0, 1, 2))(*inputs)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
