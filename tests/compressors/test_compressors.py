"""Compressors against slow float64 twins, their counts against the spec's numbers, and what must hold for any weights."""

import copy
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor import compressor_config
from jax.flatten_util import ravel_pytree
from refs import compressors_numpy as twin
from refs import reference_layout

from configs import default
from vlm_jax import compressors
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.modules import tokenpacker, windows
from vlm_jax.layers import Scores
from vlm_jax.models.projector import Projector
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.storage import run as run_settings

WIDTH, TEXT, HIDDEN, HEADS = 8, 12, 20, 2
LEARNED = ("quecc", "tokenpacker")  # with parameters, inside windows


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def case(name: str, grid: int, stride: int, taps: int = 2, seed: int = 0, batch: int = 2):
    """(module, parameters, reference state, inputs) with random weights."""
    config = compressor_config(name, stride, HEADS)
    if name == "quecc":
        state = twin.random_state(
            twin.shapes_quecc(WIDTH, taps * WIDTH, TEXT, HIDDEN, stride), seed
        )
        params, _ = reference_layout.quecc(state, HEADS, stride)
    else:
        state = twin.random_state(twin.shapes_tokenpacker(WIDTH, taps * WIDTH, HIDDEN), seed)
        params, _ = reference_layout.tokenpacker(state, HEADS)
    params = jax.tree.map(jnp.asarray, params)
    rng = np.random.default_rng([seed, 1])
    shapes = [(batch, grid**2, WIDTH), (batch, grid**2, taps * WIDTH), (batch, TEXT)]
    inputs = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    if name != "quecc":
        inputs[2] = None
    return COMPRESSORS[name].module(config, grid), params, state, inputs


@functools.cache
def compiled(module: nn.Module):
    return jax.jit(module.apply)


def run(module, params, inputs):
    return np.asarray(compiled(module)({"params": params}, *inputs).tokens)


@pytest.mark.parametrize(
    "grid, stride, taps", [(6, 1, 1), (6, 2, 2), (6, 3, 1), (6, 6, 2), (5, 5, 1)]
)
@pytest.mark.parametrize("name", LEARNED)
def test_any_grid_stride_and_number_of_taps_equals_the_slow_twin(name, grid, stride, taps):
    module, params, state, inputs = case(name, grid, stride, taps)
    last, multi, text = inputs
    if name == "quecc":
        reference = twin.quecc(state, last, multi, text[:, None], HEADS, stride)[0]
    else:
        reference = twin.tokenpacker(state, last, multi, HEADS, stride)[0]
    ours = run(module, params, inputs)
    assert ours.shape == (2, compressors.num_tokens(module.config, grid), WIDTH)
    assert np.abs(ours - reference).max() <= 2e-5 * np.abs(reference).max()


def test_windows_are_cut_row_by_row():
    grid = jnp.arange(16.0).reshape(1, 16, 1)
    cut = windows.split(grid, 4, 2)[0, :, :, :, 0]
    np.testing.assert_array_equal(cut[1], [[2, 3], [6, 7]])
    np.testing.assert_array_equal(cut[2], [[8, 9], [12, 13]])


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_the_bilinear_query_reads_only_the_middle_of_each_window(stride):
    grid = jnp.asarray(np.random.default_rng(0).standard_normal((1, 144, 3)), jnp.float32)
    ours = tokenpacker.bilinear(windows.split(grid, 12, stride))
    matrix = twin.bilinear_matrix(12 // stride, 12)
    reference = np.einsum("Yy,Xx,yxc->YXc", matrix, matrix, np.reshape(grid, (12, 12, 3)))
    np.testing.assert_allclose(ours[0], reference.reshape(-1, 3), atol=1e-6)
    if stride == 6:
        assert np.abs(ours - windows.split(grid, 12, stride).mean((2, 3))).max() > 0.1


@pytest.mark.parametrize("name", LEARNED)
def test_a_patch_changes_only_the_token_of_its_window(name):
    module, params, _, inputs = case(name, 6, 3)
    before = run(module, params, inputs)
    changed = [x if x is None else x.at[:, 5].add(1.0) if x.ndim == 3 else x for x in inputs]
    difference = np.abs(run(module, params, changed) - before).max(
        (0, 2)
    )  # patch 5: row 0, column 5
    assert difference[1] > 1e-3
    np.testing.assert_array_equal(difference[[0, 2, 3]], 0)


def test_the_question_changes_quecc_but_the_order_of_a_batch_does_not():
    module, params, _, inputs = case("quecc", 4, 2)
    before = run(module, params, inputs)
    other = run(module, params, [*inputs[:2], inputs[2].at[0].add(1.0)])
    assert np.abs(other[0] - before[0]).max() > 1e-3
    np.testing.assert_array_equal(other[1], before[1])
    flipped = run(module, params, [x[::-1] for x in inputs])
    np.testing.assert_allclose(flipped[::-1], before, atol=1e-6)


def test_with_sine_positions_quecc_tells_equal_patches_apart_by_their_place():
    """Two images whose one odd patch lies at different places of the same window: without positions, one answer."""
    plain, params, _, inputs = case("quecc", 4, 4, batch=1)
    placed = dataclasses.replace(plain.config, positions="sines").module(4)
    last, taps, query = (jnp.ones_like(x) for x in inputs)
    taps = [taps.at[:, place].set(2.0) for place in (0, 9)]
    # QueCC's filter is one number per place, so equal features alone give it nothing to tell the places of a query apart.
    one, two = (run(plain, params, [last, x, query]) for x in taps)
    np.testing.assert_allclose(one, two, atol=1e-6)
    one, two = (run(placed, params, [last, x, query]) for x in taps)
    assert np.abs(one - two).max() > 1e-4


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_equal_finite_differences(name):
    module, params, _, inputs = case(name, 4, 2, batch=1)
    flat, unravel = ravel_pytree((params, inputs))
    target = jnp.asarray(np.random.default_rng(3).standard_normal((1, 4, WIDTH)), jnp.float32)

    @jax.jit
    def loss(vector):
        p, x = unravel(vector)
        return jnp.sum(module.apply({"params": p}, *x).tokens * target)

    gradient = jax.jit(jax.grad(loss))(flat)
    for seed in range(5):
        direction = np.random.default_rng(seed).standard_normal(flat.size)
        step = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)
        measured = (loss(flat + 2e-2 * step) - loss(flat - 2e-2 * step)) / 4e-2
        assert abs(measured - gradient @ step) <= 2e-3 * np.linalg.norm(gradient)
        assert np.linalg.norm(gradient) > 1


@pytest.mark.parametrize("name", LEARNED)
def test_bfloat16_survives_large_activations(name):
    module, params, _, inputs = case(name, 4, 2)
    half = module.clone(config=compressor_config(name, 2, HEADS, dtype="bfloat16"))
    large = [x if x is None else x.at[:, 0].mul(1e4).astype(jnp.bfloat16) for x in inputs]
    out = compiled(half)({"params": params}, *large).tokens
    assert out.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(out).all())
    exact = run(module, params, [x if x is None else x.astype(jnp.float32) for x in large])
    assert np.abs(np.asarray(out, np.float32) - exact).mean() < 0.05 * np.abs(exact).max()
    grads = jax.jit(
        jax.grad(lambda p: half.apply({"params": p}, *large).tokens.astype(jnp.float32).sum())
    )(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", LEARNED)
def test_attention_weights_are_handed_out_on_request_only(name):
    module, params, _, inputs = case(name, 4, 2)
    out, kept = jax.jit(functools.partial(module.apply, mutable="intermediates"))(
        {"params": params}, *inputs
    )
    (weights,) = kept["intermediates"]["attention"]["weights"]
    assert weights.shape == (2, 4, HEADS, 2, 2)
    np.testing.assert_allclose(weights.sum((-1, -2)), 1, atol=1e-6)
    np.testing.assert_allclose(out.tokens, run(module, params, inputs), atol=1e-5)


# Counts of the true size: CLIP-L/14 at 336 px (24 x 24 patches, width 1024), four taps, a decoder of width 4096.

COUNTS = {
    ("identity", 1): 20_979_712, ("quecc", 4): 41_988_096, ("quecc", 6): 42_008_576, ("quecc", 12): 42_119_168,
    ("quecc", 24): 42_561_536, ("tokenpacker", 2): 36_722_688, ("tokenpacker", 24): 36_722_688,
}  # fmt: skip
FLOPS = {
    ("identity", 1): 24.16, ("quecc", 4): 18.6, ("quecc", 6): 17.7, ("quecc", 12): 17.1, ("quecc", 24): 17.0,
    ("tokenpacker", 2): 21.4, ("tokenpacker", 3): 17.6, ("tokenpacker", 4): 16.2,
}  # fmt: skip


def full_size(name: str, stride: int):
    taps = (12, 16, 22, 23) if COMPRESSORS[name].uses_taps else ()
    config = compressor_config(name, stride, 8, taps)
    vit, lm = presets.vit("clip-l-336"), presets.lm("vicuna-7b")
    VLMConfig(vit, config, lm)
    patches = jax.ShapeDtypeStruct((1, 576, 1024), jnp.float32)
    multi = jax.ShapeDtypeStruct((1, 576, 4096), jnp.float32) if taps else patches
    text = jax.ShapeDtypeStruct((1, 4096), jnp.float32) if name == "quecc" else None
    return config, (patches, multi, text)


def initial(module: nn.Module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return nn.unbox(shapes)["params"] if "params" in shapes else {}


@pytest.mark.parametrize("name, stride", COUNTS)
def test_parameters_of_the_true_size_are_the_published_number(name, stride):
    config, inputs = full_size(name, stride)
    module = COMPRESSORS[name].module(config, 24)
    mid = jax.ShapeDtypeStruct((1, 1, 1024), jnp.float32)
    trees = initial(module, *inputs), initial(Projector(4096, 2, "none", "none", "float32"), mid)
    assert sum(leaf.size for leaf in jax.tree.leaves(trees)) == COUNTS[name, stride]


@pytest.mark.parametrize("name, stride", FLOPS)
def test_flops_of_the_true_size_are_the_published_number(name, stride):
    config, _ = full_size(name, stride)
    entry = COMPRESSORS[name]
    tokens = entry.num_tokens(config, 24)
    projector = 2 * tokens * (1024 * 4096 + 4096**2)
    total = (entry.flops(config, 24, 1024, 4096) + projector) / 1e9
    assert round(total, 1) == pytest.approx(FLOPS[name, stride], abs=0.051)


@pytest.mark.parametrize("name, stride", [("quecc", 4), ("tokenpacker", 2)])
def test_flops_agree_with_what_the_compiler_counts(name, stride):
    config = compressor_config(name, stride, 8, (0, 1, 2, 3))
    entry, width, text = COMPRESSORS[name], 128, 256
    shapes = [(1, 576, width), (1, 576, 4 * width), (1, text)]
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    if not entry.uses_query:
        inputs[2] = None
    module = entry.module(config, 24)
    params = initial(module, *inputs)
    counted = jax.jit(module.apply).lower({"params": params}, *inputs).compile().cost_analysis()
    assert counted["flops"] == pytest.approx(entry.flops(config, 24, width, text), rel=0.1)


@pytest.mark.parametrize(
    "stride, tokens", [(1, 576), (2, 144), (3, 64), (4, 36), (6, 16), (8, 9), (12, 4), (24, 1)]
)
def test_visual_tokens_of_each_stride(stride, tokens):
    for name in ("quecc", "tokenpacker", "pool"):
        assert compressors.num_tokens(compressor_config(name, stride), 24) == tokens
    assert compressors.num_tokens(compressor_config("identity"), 24) == 576


def test_initial_weights_have_the_spread_of_the_references():
    module = COMPRESSORS["quecc"].module(compressor_config("quecc", 4, 8), 8)
    patches, text = jnp.zeros((1, 64, 256)), jnp.zeros((1, 128))
    p = nn.unbox(jax.jit(module.init)(jax.random.key(0), patches, patches, text))["params"]
    peak = lambda x: float(jnp.abs(x).max())  # noqa: E731
    attention = p["attention"]
    assert peak(attention["q"]["kernel"]) == pytest.approx((6 / 1024) ** 0.5, rel=0.01)
    assert peak(attention["out"]["kernel"]) == pytest.approx(1 / 16, rel=0.01)
    assert peak(attention["q"]["bias"]) == peak(attention["out"]["bias"]) == 0
    assert peak(p["downsample"]["filter"]) == pytest.approx(1 / 4, rel=0.01)
    assert peak(p["downsample"]["bias"]) == pytest.approx(1 / 4, rel=0.05)
    assert peak(p["text"]["kernel"]) == pytest.approx(128**-0.5, rel=0.01)
    assert peak(p["key_mlp"]["fc1"]["bias"]) == pytest.approx(1 / 16, rel=0.05)
    module = COMPRESSORS["tokenpacker"].module(compressor_config("tokenpacker", 4, 8), 8)
    p = nn.unbox(jax.jit(module.init)(jax.random.key(0), patches, patches))["params"]
    for kernel in (p["query"], p["key_mlp"]["fc2"], p["attention"]["out"]):
        assert float(kernel["kernel"].std()) == pytest.approx(0.02, rel=0.02)
    assert peak(p["key_mlp"]["fc1"]["bias"]) == 0
    assert "bias" not in p["query"]
    assert peak(p["attention"]["v"]["kernel"]) == pytest.approx((6 / 1024) ** 0.5, rel=0.01)


def test_sizes_that_do_not_fit_are_refused_with_the_allowed_ones():
    vit, lm = presets.vit("clip-l-336"), presets.lm("vicuna-7b")
    for name in LEARNED:
        with pytest.raises(
            ConfigError, match=r"grid 24 .* stride 5; use one of \[1, 2, 3, 4, 6, 8, 12, 24\]"
        ):
            VLMConfig(vit, compressor_config(name, 5), lm)
        with pytest.raises(ConfigError, match="width 1024 is not divisible by num_heads 6"):
            VLMConfig(vit, compressor_config(name, 4, 6), lm)
    with pytest.raises(ConfigError, match="'qecc'; use one of identity, quecc, tokenpacker"):
        compressors.get("qecc")


TRAITS = {
    "identity": set(), "pool": {"sizable"}, "tokenpacker": {"uses_taps", "sizable"},
    "quecc": {"uses_query", "uses_taps", "sizable"}, "m3": {"elastic", "sizable", "inside"},
    "mqt": {"elastic", "draws", "sizable", "instead"}, "prumerge": {"uses_scores"},
    "querypool": {"uses_query", "uses_taps", "elastic", "draws", "sizable", "inside"}, "prumerge_plus": {"uses_scores"},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAITS)
def test_traits_say_what_each_compressor_is(name):
    entry = compressors.get(name)
    traits = ("uses_query", "uses_taps", "uses_scores", "elastic", "draws", "sizable")
    found = {trait for trait in traits if getattr(entry, trait)} | {entry.place} - {"before"}
    assert found == TRAITS[name]
    assert compressors.settings(name).name == name


@pytest.mark.parametrize("fields", [{}, {"taps": (1, 2), "stride": 2, "query_grid": 3}])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_number_of_parameters_is_that_of_the_module(name, fields):
    config = compressor_config(name, num_heads=HEADS, **fields)
    entry, width, text = COMPRESSORS[name], 16, 24
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)  # noqa: E731
    taps = width * max(1, len(config.taps))
    scores = Scores(array(width), array(36, width), None)
    module = entry.module(config, 6, *(text,) * (entry.place == "instead"))
    query = array(text) if entry.uses_query else None
    given = array(36, width), array(36, taps), query, scores if entry.uses_scores else None
    params = initial(module, *given)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params(width, text)


def test_a_setting_of_another_compressor_is_refused_with_its_own_ones():
    with pytest.raises(ConfigError) as told:
        compressors.settings("pool", query_grid=4)
    assert str(told.value) == "pool: has no setting 'query_grid'; it has dtype, stride."
    block = {"name": "pool", "stride": 2, "query_grid": 4, "taps": [1], "dtype": "float32"}
    assert compressors.chosen(block) == compressors.settings("pool", stride=2)
    with pytest.raises(ConfigError, match=r"pool: has no setting 'taps'; it has dtype, stride."):
        compressors.chosen(block, {"taps"})
    with pytest.raises(ConfigError, match=r"pool: has no setting 'strid'; it has dtype, stride."):
        compressors.chosen({"name": "pool", "strid": 2})


def test_a_config_file_may_not_set_what_its_compressor_does_not_have():
    c = default.get_config()
    c.model.compressor.name = "pool"
    pooled = compressors.settings("pool", stride=4, dtype="bfloat16")
    assert run_settings.resolve(c).model.compressor == pooled  # num_heads and taps as in default.py
    for field, value in {"query_grid": 4, "taps": (1, 2), "num_heads": 16}.items():
        other = copy.deepcopy(c)
        other.model.compressor[field] = value
        with pytest.raises(
            ConfigError, match=f"pool: has no setting '{field}'; it has dtype, strid"
        ):
            run_settings.resolve(other)
        assert run_settings.resolve(other, ["model.compressor.name"]).model.compressor == pooled


def test_a_config_is_turned_to_another_compressor_without_the_settings_of_the_last():
    block = default.get_config().model.compressor.lock()
    compressors.choose(block, "mqt", query_grid=8)
    assert block.to_dict() == {"name": "mqt", "num_heads": 8, "dtype": "bfloat16", "query_grid": 8}
    compressors.choose(block, "pool")
    assert block.to_dict() == {"name": "pool", "dtype": "bfloat16"}
