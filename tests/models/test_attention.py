"""Attention kernels: the same values and gradients; each platform's is chosen only where it computes the same."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax import compressors, sharding
from vlm_jax.models import attention, vlm
from vlm_jax.models import lm as lm_module
from vlm_jax.models.attention import AttentionMask, attend
from vlm_jax.models.lm import causal_mask
from vlm_jax.models.vlm import Inputs
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.training import step

ROWS, HEADS, KV_HEADS = 2, 4, 2


def drawn(length, head_dim):
    rng = np.random.default_rng(0)
    sizes = [(HEADS, head_dim), (KV_HEADS, head_dim), (KV_HEADS, head_dim)]
    return [jnp.asarray(rng.normal(size=(ROWS, length, *size)), jnp.float32) for size in sizes]


@pytest.mark.parametrize("length, head_dim", [(130, 64), (256, 128)])
def test_splash_attention_equals_the_masked_softmax_and_so_do_its_gradients(length, head_dim):
    q, k, v = drawn(length, head_dim)
    samples = np.zeros((ROWS, length), np.int32)
    samples[1, 50:] = 1  # two samples in one row
    segments = np.zeros((ROWS, length), np.int32)
    segments[0, -20:] = -1  # padding
    segments[0, 10:14] = -1  # hidden visual slots
    ids = jnp.asarray(np.where(segments < 0, -1, samples))
    mask = causal_mask(jnp.asarray(segments), jnp.asarray(segments))
    mask &= samples[:, :, None] == samples[:, None, :]
    real = jnp.asarray(segments >= 0)[:, :, None, None]

    def loss(kernel, q, k, v):
        return jnp.square(jnp.where(real, kernel(q, k, v), 0)).mean()

    of = lambda kernel: jax.value_and_grad(loss, (1, 2, 3))(kernel, q, k, v)  # noqa: E731
    want, grads = of(lambda *x: attend(*x, AttentionMask(mask)))
    found, made = of(lambda *x: attention.splash_shard(*x, ids, interpret=True)[0])
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for mine, theirs in zip(made, grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("before", [0, 20])
def test_splash_reads_left_padded_prompts_behind_the_text_they_share(before):
    """As a prefill: rows of 140 tokens, some of them padding on the left, behind `before` keys that all of them see."""
    length = 140
    q, k, v = drawn(length + before, 64)
    q = q[:, before:]
    segments = np.zeros((ROWS, length), np.int32)
    segments[0, :33] = segments[1, :5] = -1
    segments[1, 60:64] = -1  # hidden visual slots
    keys = jnp.asarray(np.pad(segments, ((0, 0), (before, 0))))
    want = attend(q, k, v, AttentionMask(causal_mask(jnp.asarray(segments), keys, before)))
    found = attention.splash_shard(q, k, v, jnp.asarray(segments), keys, interpret=True)[0]
    real = segments >= 0
    np.testing.assert_allclose(found[real], want[real], rtol=1e-4, atol=1e-6)


def test_splash_of_an_image_encoder_sees_every_patch():
    q, k, v = drawn(150, 72)
    want = attend(q, k, v)
    found = attention.splash_shard(q, k, v, interpret=True)[0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_a_model_with_splash_kernels_reads_prompts_as_without_them(exp, monkeypatch):
    """The encoder and the prefill of a whole model, in a cache, with the kernel emulated."""
    kernel = functools.partial(attention.splash_shard, interpret=True)
    monkeypatch.setattr(attention, "splash_shard", kernel)
    used = []
    monkeypatch.setattr(
        attention, "_splash", lambda *x, of=attention._splash: (used.append(x[0].shape), of(*x))[1]
    )
    rng = np.random.default_rng(3)
    length, px = 9, exp.model.vit.image_px
    pad = np.array([[0], [3]])
    slots = np.tile(np.arange(length), (2, 1))
    inputs = Inputs(
        tokens=jnp.asarray(rng.integers(4, 60, (2, length))),
        visual_index=jnp.asarray(np.where(slots == 4, 0, -1)),
        positions=jnp.asarray(np.maximum(slots - pad, 0)),
        segments=jnp.asarray(np.where(slots >= pad, 0, -1)),
        images=jnp.asarray(rng.integers(0, 256, (2, 1, px, px, 3)), jnp.uint8),
        query_tokens=jnp.ones((2, 1, 3), jnp.int32),
        query_mask=jnp.ones((2, 1, 3), bool),
    )
    params = nn.unbox(vlm.init_params(exp.model, jax.random.key(0)))

    def prefill(kernel):
        lm = dataclasses.replace(exp.model.lm, attention=kernel)
        model = vlm.VLM(dataclasses.replace(exp.model, lm=lm))
        cache = lm_module.empty_cache(lm, 2, length + 4)
        logits, cache, _ = model.apply({"params": params}, inputs, cache, method="prefill")
        return logits, cache.k[:, 0]  # the first row has no padding

    for ours, theirs in zip(prefill("splash"), prefill("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    shapes = {shape[1] for shape in used}
    assert {length, exp.model.vit.num_patches} <= shapes, shapes


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    return experiment.resolve(tiny.config(tiny.write(tmp_path_factory.mktemp("tiny") / "data")))


def chosen(exp, platform, compressor="tokenpacker", turns="dialogue", packing=False, **lm):
    """The kernel on a device of `platform`; GPUs are of compute capability 9.0."""
    device = types.SimpleNamespace(platform=platform, compute_capability="9.0")
    flash = attention.flash_kernel(device)
    model = dataclasses.replace(
        exp.model,
        lm=dataclasses.replace(exp.model.lm, **{"dtype": "bfloat16"} | lm),
        compressor=compressors.chosen(
            dataclasses.asdict(exp.model.compressor) | {"name": compressor}
        ),
    )
    data = dataclasses.replace(exp.data, turns=turns, packing=packing)
    return step.attention_kernel(
        dataclasses.replace(exp, model=model, data=data),
        flash,
    )


@pytest.mark.parametrize("length", [128, 129, 300])
def test_blocks_of_queries_give_the_whole_softmax_and_its_gradients(length):
    """Grouped heads, padding on the left, 20 keys before the queries, 9 unused slots of a cache behind them."""
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.standard_normal((2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, length + 29, 2, 8)), jnp.float32) for _ in "kv")
    causal = np.arange(length + 20)[None] <= 20 + np.arange(length)[:, None]
    mask = np.stack([causal, causal & (np.arange(length + 20) >= 5)])

    def whole(q, k, v):
        cut = slice(0, length + 20)
        return jax.nn.dot_product_attention(
            q, k[:, cut], v[:, cut], mask=jnp.asarray(mask)[:, None]
        )

    def of(attention):
        wanted = lambda *x: jnp.sum(jnp.sin(attention(*x)))  # noqa: E731
        return attention(q, k, v), jax.grad(wanted, (0, 1, 2))(q, k, v)

    got, want = of(lambda *x: attend(*x, AttentionMask(jnp.asarray(mask)))), of(whole)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    assert not np.asarray(got[1][1])[:, length + 20 :].any()  # unused slots


def test_auto_takes_the_platforms_kernel_where_it_computes_the_same(exp):
    assert [chosen(exp, p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    for platform in ("gpu", "tpu"):
        assert chosen(exp, platform, turns="independent") == "xla"
        assert chosen(exp, platform, sliding_window=8) == "xla"
        assert chosen(exp, platform, sliding_window=32) != "xla"  # as long as a row
        assert chosen(exp, platform, attention="xla") == "xla"
    assert chosen(exp, "gpu", dtype="float32") == chosen(exp, "gpu", head_dim=160) == "xla"
    assert [chosen(exp, p, packing=True) for p in ("gpu", "tpu")] == ["xla", "splash"]
    assert (chosen(exp, "gpu", "mqt"), chosen(exp, "tpu", "mqt")) == ("xla", "splash")


def test_gpus_without_a_flash_kernel_take_xla():
    gpu = lambda c: types.SimpleNamespace(platform="gpu", compute_capability=c)  # noqa: E731
    found = [attention.flash_kernel(gpu(c)) for c in ("7.5", "8.0", "12.0", "gfx90a")]
    assert found == ["xla", "cudnn", "cudnn", "xla"]


def test_a_kernel_that_cannot_be_used_is_refused_with_the_reason(exp):
    with pytest.raises(ConfigError, match=r"attention 'splash' cannot be used: these devices do not have it; use 'auto' or 'xla'"):  # fmt: skip
        chosen(exp, "cpu", attention="splash")
    with pytest.raises(ConfigError, match=r"attention 'cudnn' cannot be used: compressor mqt hides visual slots"):  # fmt: skip
        chosen(exp, "gpu", "mqt", attention="cudnn")
    with pytest.raises(ConfigError, match=r"cannot be used: data.turns is independent"):  # fmt: skip
        chosen(exp, "tpu", turns="independent", attention="splash")


def test_without_a_mesh_nothing_is_cut_and_the_mesh_of_one_device_changes_nothing(exp):
    from vlm_jax.layers import on_shards

    double = lambda x: (x * 2,)  # noqa: E731
    x = jnp.arange(6.0).reshape(2, 3)
    names = [("batch", None)]
    alone = on_shards(double, names, names)
    assert alone is double
    with sharding.use(sharding.make_mesh(exp.mesh)):
        (found,) = jax.jit(on_shards(double, names, names))(x)
    np.testing.assert_array_equal(found, x * 2)
