"""pool, M3 and MQT against slow float64 twins and published counts; any number of tokens is what a smaller model shows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor import compressor_config
from jax.flatten_util import ravel_pytree
from refs import compressors_numpy, reference_layout
from refs import elastic_numpy as twin

from vlm_jax import compressors
from vlm_jax.compressors import COMPRESSORS, with_tokens
from vlm_jax.compressors.modules import m3, mqt, pool
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.costs import flops
from vlm_jax.layers import sincos_positions
from vlm_jax.models.projector import Projector
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig

WIDTH, HIDDEN, HEADS = 8, 12, 2


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def close(ours, reference, tolerance=2e-5) -> None:
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def patches(grid: int, width: int = WIDTH, batch: int = 2):
    rng = np.random.default_rng(grid)
    return jnp.asarray(rng.standard_normal((batch, grid**2, width)), jnp.float32)


def mqt_case(grid: int, side: int, **fields):
    """(module, parameters, reference state, features) with random weights."""
    config = compressor_config("mqt", num_heads=HEADS, query_grid=side, **fields)
    state = compressors_numpy.random_state(twin.shapes_mqt(WIDTH, side, HIDDEN), 3)
    params = jax.tree.map(jnp.asarray, reference_layout.mqt(state, HEADS))
    return mqt.MQT(config, grid, HIDDEN), params, state, patches(grid)


@functools.cache
def compiled(module: nn.Module):
    return jax.jit(module.apply)


def run(module, params, features):
    return np.asarray(compiled(module)({"params": params}, features, features).tokens)


# Each compressor alone


@pytest.mark.parametrize("grid, stride", [(24, 4), (27, 3), (14, 7), (16, 16), (6, 1)])
def test_pool_and_m3_are_the_mean_of_each_window(grid, stride):
    x, tokens = patches(grid), (grid // stride) ** 2
    for config in (
        compressor_config("pool", stride),
        with_tokens(compressor_config("m3"), grid, tokens),
    ):
        entry = COMPRESSORS[config.name]
        assert entry.num_tokens(config, grid) == tokens
        close(np.asarray(entry.module(config, grid).apply({}, x, x).tokens), twin.pooled(x, stride))


def querypool_case(grid: int, tokens: int):
    config = with_tokens(compressor_config("querypool"), grid, tokens)
    rng = np.random.default_rng([grid, tokens])
    module, x, query = config.module(grid), patches(grid), rng.standard_normal((2, HIDDEN))
    query = jnp.asarray(query, jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x, x, query)
    return module, variables, x, query


@pytest.mark.parametrize("grid, tokens", [(8, 16), (8, 1), (6, 4), (6, 36)])
def test_querypool_is_a_softmax_of_the_question_over_each_window(grid, tokens):
    module, variables, x, query = querypool_case(grid, tokens)
    found = jax.jit(module.apply)(variables, x, x, query)
    p = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
    normed = {}
    for name, value in (
        ("key_mlp", x + sincos_positions(grid, WIDTH)),
        ("text", np.asarray(query)),
    ):
        if name == "key_mlp":
            hidden = value @ p[name]["fc1"]["kernel"] + p[name]["fc1"]["bias"]
            value = np.asarray(jax.nn.gelu(hidden, approximate=False))
            value, norm = value @ p[name]["fc2"]["kernel"] + p[name]["fc2"]["bias"], p[name]["norm"]
        else:
            value, norm = value @ p[name]["kernel"] + p[name]["bias"], p["text_norm"]
        value = value - value.mean(-1, keepdims=True)
        value /= np.sqrt((value**2).mean(-1, keepdims=True) + 1e-6)
        normed[name] = value * norm["scale"] + norm["bias"]
    logits = np.einsum("bpc,bc->bp", normed["key_mlp"], normed["text"]) / np.sqrt(WIDTH)
    side = int(tokens**0.5)
    y, z = np.divmod(np.arange(grid**2), grid)
    window = y * side // grid * side + z * side // grid
    for m in range(tokens):
        inside = np.exp(logits[:, window == m])
        shares = inside / inside.sum(axis=1, keepdims=True)
        close(found.tokens[:, m], np.einsum("bp,bpc->bc", shares, np.asarray(x)[:, window == m]))
        close(found.logits[:, m], np.log(inside.sum(axis=1)))


def test_querypool_tokens_of_finer_tokens_equal_those_of_patches_and_depend_on_the_question():
    module, variables, x, query = querypool_case(8, 16)
    fine = jax.jit(module.apply)(variables, x, x, query)
    for count in (16, 4, 1):
        coarse = module.clone(config=with_tokens(module.config, 8, count))
        wanted = jax.jit(coarse.apply)(variables, x, x, query).tokens
        shown = type(module).show(fine, jnp.int32(count))
        close(np.asarray(shown.tokens[:, :count]), np.asarray(wanted))
        assert shown.valid.sum(axis=1).tolist() == [count] * 2
    other = jax.jit(module.apply)(variables, x, x, query[::-1]).tokens
    assert np.abs(other - fine.tokens).max() > 1e-3


@pytest.mark.parametrize("source", mqt.KEYS)
@pytest.mark.parametrize("grid, side, count", [(24, 3, 9), (27, 3, 2), (14, 4, 16), (16, 4, 1)])
def test_any_grid_and_number_of_queries_equals_the_slow_twin(grid, side, count, source):
    module, params, state, x = mqt_case(grid, side, key_source=source, visual_tokens=count)
    close(run(module, params, x), twin.mqt(state, x, HEADS, count, source == "image"))


def test_the_position_table_is_the_references():
    table = mqt.query_positions(4, 16)
    np.testing.assert_array_equal(table, twin.sine_table(4, 16))
    np.testing.assert_array_equal(table, table.astype(np.float16))
    assert np.abs(table[1, :8] - table[0, :8]).max() > 0.5  # the column is in the first half
    np.testing.assert_array_equal(table[1, 8:], table[0, 8:])


def test_resizing_to_the_same_grid_changes_nothing():
    table = mqt.query_positions(4, 16)
    np.testing.assert_allclose(mqt.resized(table, 4, 4), table, atol=1e-7)


def test_mqt_attention_is_the_same_for_every_image_unless_keys_see_it():
    for source, images in (("positions", 1), ("image", 2)):
        module, params, _, x = mqt_case(6, 3, key_source=source)
        apply = jax.jit(functools.partial(module.apply, mutable="intermediates"))
        _, kept = apply({"params": params}, x, x)
        (weights,) = kept["intermediates"]["weights"]
        assert weights.shape == (images, HEADS, 9, 36) and weights.dtype == jnp.float32
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_fewer_mqt_tokens_are_the_first_of_all():
    module, params, _, x = mqt_case(6, 4)
    everything = run(module, params, x)
    for count in (1, 5, 16):
        some = module.clone(config=with_tokens(module.config, 6, count))
        np.testing.assert_allclose(run(some, params, x), everything[:, :count], atol=1e-6)
        visual = mqt.MQT.show(VisualTokens(jnp.asarray(everything)), jnp.int32(count))
        np.testing.assert_array_equal(visual.valid, [[True] * count + [False] * (16 - count)] * 2)


@pytest.mark.parametrize("count", [1, 4, 9, 36])
def test_m3_shows_what_it_would_pool_to(count):
    x = patches(6)
    visual = jax.jit(m3.M3.show)(VisualTokens(x), jnp.int32(count))
    np.testing.assert_allclose(
        visual.tokens[:, :count], twin.pooled(np.asarray(x), 6 // round(count**0.5)), atol=1e-6
    )
    np.testing.assert_array_equal(visual.valid, [[True] * count + [False] * (36 - count)] * 2)
    assert bool(jnp.isfinite(visual.tokens).all())


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_pooling_before_the_last_map_equals_pooling_after_it(layers, norm):
    x = patches(6)
    projector = Projector(HIDDEN, layers, norm, "none", "float32")
    params = nn.unbox(projector.init(jax.random.key(0), x))["params"]
    bound = projector.bind({"params": params})
    plain = bound.finish(pool.mean(bound.late(bound.early(x)), 6, 3))
    cheap = bound.finish(bound.late(pool.mean(bound.early(x), 6, 3)))
    close(np.asarray(cheap), np.asarray(plain), 1e-6)
    everywhere = bound.finish(bound.late(bound.early(pool.mean(x, 6, 3))))
    assert (np.abs(everywhere - plain).max() > 1e-3) == (layers > 1)  # GELU does not commute


@pytest.mark.parametrize("source", mqt.KEYS)
def test_gradients_of_mqt_equal_finite_differences(source):
    module, params, _, x = mqt_case(4, 3, key_source=source)
    x = x[:1]
    flat, unravel = ravel_pytree((params, x))
    target = jnp.asarray(np.random.default_rng(3).standard_normal((1, 9, HIDDEN)), jnp.float32)

    @jax.jit
    def loss(vector):
        p, x = unravel(vector)
        return jnp.sum(module.apply({"params": p}, x, x).tokens * target)

    gradient = jax.jit(jax.grad(loss))(flat)
    assert np.linalg.norm(gradient) > 1
    for seed in range(5):
        direction = np.random.default_rng(seed).standard_normal(flat.size)
        step = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)
        measured = (loss(flat + 2e-2 * step) - loss(flat - 2e-2 * step)) / 4e-2
        assert abs(measured - gradient @ step) <= 2e-3 * np.linalg.norm(gradient)


def test_gradients_of_pooling_spread_evenly():
    gradient = jax.grad(lambda x: pool.mean(x, 6, 3)[:, 1].sum())(patches(6))
    square = np.asarray(gradient[0, :, 0]).reshape(6, 6)
    np.testing.assert_allclose(square[:3, 3:], 1 / 9, atol=1e-7)
    assert np.abs(square).sum() == pytest.approx(1)


@pytest.mark.parametrize("source", mqt.KEYS)
def test_bfloat16_survives_large_activations(source):
    module, params, _, x = mqt_case(4, 3, key_source=source)
    half = module.clone(
        config=compressor_config(
            "mqt", num_heads=HEADS, query_grid=3, key_source=source, dtype="bfloat16"
        )
    )
    x = x.at[:, 0].mul(1e4).astype(jnp.bfloat16)
    out = compiled(half)({"params": params}, x, x).tokens
    assert out.dtype == jnp.bfloat16 and bool(jnp.isfinite(out).all())
    exact = run(module, params, x.astype(jnp.float32))
    assert np.abs(np.asarray(out, np.float32) - exact).mean() < 0.05 * np.abs(exact).max()
    text = str(jax.make_jaxpr(half.apply)({"params": params}, x, x))
    (exponential,) = [line for line in text.splitlines() if " exp " in line]
    assert "f32" in exponential
    grads = jax.grad(lambda p: half.apply({"params": p}, x, x).tokens.astype(jnp.float32).sum())
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(jax.jit(grads)(params)))


def test_pooling_bfloat16_adds_in_float32():
    x = jnp.full((1, 576, 1), 1.0, jnp.bfloat16).at[0, 0].set(256.0)
    assert float(pool.mean(x, 24, 24)[0, 0, 0]) == float(jnp.bfloat16(831 / 576))


def test_initial_weights_of_mqt_have_the_spread_of_the_reference():
    module = mqt.MQT(compressor_config("mqt", num_heads=8), 4, 1024)
    x = jnp.zeros((1, 16, 256))
    p = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, x))["params"]
    assert float(p["query"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(p["out"]["kernel"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(p["project"]["kernel"].std()) == pytest.approx(1 / 32, rel=0.02)
    assert float(jnp.abs(p["k"]["kernel"]).max()) == pytest.approx((6 / 1024) ** 0.5, rel=0.01)
    assert not any(float(jnp.abs(p[n]["bias"]).max()) for n in ("q", "k", "v", "out"))


# The true size: CLIP-L/14 at 336 px, a decoder of width 4096.


def full_size(name: str, **fields) -> VLMConfig:
    config = compressor_config(name, num_heads=16, **fields)
    return VLMConfig(presets.vit("clip-l-336"), config, presets.lm("vicuna-7b"))


@pytest.mark.parametrize(
    "name, count", [("mqt", 8_660_992), ("m3", 20_979_712), ("pool", 20_979_712)]
)
def test_parameters_of_the_true_size_are_the_published_number(name, count):
    from vlm_jax.models.vlm import init_params

    shapes = jax.eval_shape(lambda: init_params(full_size(name), jax.random.key(0)))
    parts = [shapes[part] for part in ("compressor", "projector") if part in shapes]
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(parts))) == count
    assert len(parts) == 1  # MQT has no projector, the others nothing else


@pytest.mark.parametrize(
    "count, straight, shared", [(256, 6.24, 4.19), (144, 4.57, 2.89), (36, 2.95, 1.63), (1, 2.43, 1.22)]
)  # fmt: skip
def test_flops_of_mqt_are_the_published_number(count, straight, shared):
    config = full_size("mqt", visual_tokens=count)
    found = flops.forward_flops(config, text_tokens=8)
    weights = config.compressor.weights_flops(24, 1024)
    assert found.projector == 0
    assert round(found.compressor / 1e9, 2) == straight
    assert round((found.compressor - weights) / 1e9, 2) == shared


@pytest.mark.parametrize("count", [576, 144, 36, 9, 1])
def test_flops_of_m3_are_those_of_the_first_map_on_patches_and_the_last_on_tokens(count):
    found = flops.forward_flops(full_size("m3", visual_tokens=count), text_tokens=8)
    first = 2 * 576 * 1024 * 4096
    assert round(first / 1e9, 2) == 4.83
    assert found.projector == first + 2 * count * 4096**2 and found.compressor == 0
    same = flops.forward_flops(full_size("pool", stride=24 // round(count**0.5)), text_tokens=8)
    assert same.projector == 2 * count * (1024 * 4096 + 4096**2)
    assert same.prefill == found.prefill


@pytest.mark.parametrize("images", [1, 6])
def test_flops_of_mqt_agree_with_what_the_compiler_counts(images):
    config, width, hidden = compressor_config("mqt", num_heads=8, visual_tokens=100), 128, 256
    module, x = mqt.MQT(config, 24, hidden), jax.ShapeDtypeStruct((images, 576, 128), jnp.float32)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, x))["params"]
    counted = jax.jit(module.apply).lower({"params": params}, x, x).compile().cost_analysis()
    once = config.weights_flops(24, width)  # for all images of a batch
    expected = once + images * (config.flops(24, width, hidden) - once)
    assert counted["flops"] == pytest.approx(expected, rel=0.1)


# Settings


def test_counts_that_cannot_be_shown_are_refused_with_the_allowed_ones():
    allowed = r"24x24 grid; use one of \[1, 4, 9, 16, 36, 64, 144, 576\]"
    for count in (2, 25, 100, 256, 577):  # the reference gives 1, 36, 144, 576 and 576 tokens
        with pytest.raises(
            ConfigError, match=f"visual_tokens {count} cannot be cut from a {allowed}"
        ):
            full_size("m3", visual_tokens=count)
    with pytest.raises(ConfigError, match=r"visual_tokens 64 cannot be cut from a 12x12 grid"):
        full_size("m3", train_tokens=(144, 64))
    with pytest.raises(ConfigError, match="16 x 16 queries give 1 to 256 visual tokens, not 257"):
        full_size("mqt", visual_tokens=257)
    with pytest.raises(ConfigError, match="3 x 3 queries give 1 to 9 visual tokens, not 10"):
        full_size("mqt", query_grid=3, train_tokens=(2, 10))
    with pytest.raises(ConfigError, match="width 1024 is not divisible by num_heads 6"):
        VLMConfig(
            presets.vit("clip-l-336"),
            compressor_config("mqt", num_heads=6),
            presets.lm("vicuna-7b"),
        )
    with pytest.raises(
        ConfigError, match="pool: has no setting 'visual_tokens'; it has dtype, stride"
    ):
        compressors.settings("pool", visual_tokens=4)
    with pytest.raises(ConfigError, match="identity: its visual tokens cannot be chosen; use one"):
        with_tokens(compressor_config("identity"), 24, 4)
    with pytest.raises(ConfigError, match="pool: grid 24 is not divisible by stride 5; use one of"):
        full_size("pool", stride=5)


def test_the_numbers_trained_for_are_the_papers_unless_given():
    tokens = lambda name, grid, **f: compressors.train_tokens(compressor_config(name, **f), grid)  # noqa: E731
    assert tokens("m3", 24) == (576, 144, 36, 9, 1)
    assert tokens("m3", 27) == (729, 81, 9, 1)
    assert tokens("m3", 14) == (196, 49, 1)
    assert tokens("m3", 16) == (256, 64, 16, 4, 1)
    assert tokens("m3", 24, train_tokens=(1, 36)) == (36, 1)
    assert tokens("mqt", 24) == tuple(range(256, 0, -2)) and len(tokens("mqt", 24)) == 128
    assert tokens("mqt", 24, train_tokens=(256,)) == (256,)  # its first stage
    assert tokens("pool", 24, stride=4) == (36,)


def test_training_has_slots_for_the_most_tokens_and_inference_for_those_shown():
    for name, train, most in (("m3", (), 576), ("mqt", (), 256), ("mqt", (2, 30), 30)):
        model = full_size(name, visual_tokens=1, train_tokens=train)
        trained = compressors.for_training(model)
        assert compressors.num_tokens(trained.compressor, 24) == most
        assert compressors.num_tokens(model.compressor, 24) == 1
    assert compressors.for_training(full_size("pool")) == full_size("pool")
    passes = [compressors.decoder_passes(full_size(name)) for name in ("m3", "mqt", "pool")]
    assert passes == [5, 1, 1]
