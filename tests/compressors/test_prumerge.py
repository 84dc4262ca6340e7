"""PruMerge and PruMerge+ against a slow twin, and what must hold whatever the image: order, padding, limits, counts."""

import functools
import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compressor import compressor_config
from refs import prumerge_numpy as twin

from vlm_jax import compressors, features, train
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.modules import prumerge
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.layers import Scores
from vlm_jax.models.vlm import VLM, Inputs, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import CompressorConfig, VLMConfig

NAMES = ("prumerge", "prumerge_plus")
WIDTH = 8


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def states(grid: int, batch: int = 3, seed: int = 0) -> list[np.ndarray]:
    """(states, queries, keys) [B 1+P C]: image b has about b patches that the class token looks at much more."""
    rng = np.random.default_rng([seed, grid])
    x, q, k = (rng.standard_normal((batch, 1 + grid**2, WIDTH)) for _ in range(3))
    for b in range(batch):
        k[b, 1 + rng.choice(grid**2, b, replace=False)] += 2.0 * q[b, 0]
    return [np.float32(v) for v in (x, q, k)]


def given(arrays: list[np.ndarray], cls: bool = True) -> tuple:
    """The compressor's arguments."""
    x, q, k = map(jnp.asarray, arrays)
    if not cls:
        return x, x, None, Scores(q.mean(axis=1), k, None)
    return x[:, 1:], x[:, 1:], None, Scores(q[:, 0], k[:, 1:], k[:, 0])


def settings(name: str, ratio: str, **fields) -> CompressorConfig:
    return compressor_config(name, prune_ratio=ratio, **({"neighbours": 5} | fields))


@functools.cache
def compiled(config: CompressorConfig, grid: int):
    module = COMPRESSORS[config.name].module(config, grid)
    return jax.jit(functools.partial(module.apply, mutable="intermediates"))


def run(config: CompressorConfig, grid: int, inputs: tuple) -> list[dict]:
    """Per image its tokens, kept patches and the rest, without padding, and the weights of the tokens."""
    (tokens, valid, places, *_), sown = compiled(config, grid)({}, *inputs)
    (chosen,), (weights,) = (sown["intermediates"][n] for n in ("chosen", "weights"))
    slots = compressors.num_tokens(config, grid)
    assert tokens.shape == (len(inputs[0]), slots, WIDTH) and bool(jnp.isfinite(tokens).all())
    assert (valid is None) == (config.prune_ratio == "fixed")
    out = []
    for b in range(len(tokens)):
        filled = np.ones(slots, bool) if valid is None else np.asarray(valid[b])
        np.testing.assert_array_equal(filled[:-1], chosen.valid[b])
        np.testing.assert_array_equal(places[b], [*chosen.kept[b], grid**2])
        assert filled[-1]
        out.append({
            "tokens": np.asarray(tokens[b])[filled], "kept": np.asarray(chosen.kept[b])[filled[:-1]].tolist(),
            "complement": np.flatnonzero(chosen.rest[b]).tolist(), "weights": np.asarray(weights[b])[filled],
        })  # fmt: skip
    return out


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours["kept"] == theirs["kept"]
    assert ours["complement"] == theirs["complement"]
    scale = np.abs(theirs["tokens"]).max()
    np.testing.assert_allclose(ours["tokens"], theirs["tokens"], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(
    "grid, cls, sample_last", [(3, True, True), (7, False, True), (10, True, False)]
)
@pytest.mark.parametrize("ratio", ["adaptive", "batch", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_equals_the_slow_twin_on_any_grid(name, ratio, grid, cls, sample_last):
    arrays = states(grid)
    if not cls:
        arrays = [v[:, 1:] for v in arrays]
    references = twin.prumerge(
        *arrays, plus=name == "prumerge_plus", ratio=ratio, neighbours=5, cls=cls, bound=grid**2 - (not sample_last),
    )  # fmt: skip
    config = settings(name, ratio, sample_last=sample_last)
    for ours, theirs in zip(run(config, grid, given(arrays, cls)), references, strict=True):
        assert_same(ours, theirs)


def test_the_images_of_these_tests_differ_in_how_many_patches_they_keep():
    counts = [len(image["kept"]) for image in run(settings(NAMES[0], "adaptive"), 10, given(states(10, 6)))]  # fmt: skip
    assert len(set(counts)) > 3


@pytest.mark.parametrize(
    "name, ratio", [("prumerge_plus", 1 / 4), ("prumerge_plus", 1 / 3), ("prumerge", 1.0)]
)
def test_a_large_fixed_ratio_equals_the_twin_with_its_repeats(name, ratio):
    arrays = states(6)
    config = settings(name, "fixed", fixed_ratio=ratio)
    references = twin.prumerge(
        *arrays, plus=name == "prumerge_plus", ratio="fixed", fixed_ratio=ratio, neighbours=5
    )
    for ours, theirs in zip(run(config, 6, given(arrays)), references, strict=True):
        assert_same(ours, theirs)
        assert (len(set(ours["kept"])) < len(ours["kept"])) == (name == "prumerge_plus")


def test_the_class_tokens_row_is_that_of_the_whole_attention_matrix():
    _, q, k = states(6)
    logits = jnp.einsum("bqc,bkc->bqk", q, k) / math.sqrt(WIDTH)
    whole = jax.nn.softmax(logits, axis=-1)[:, 0, 1:]
    ours = prumerge.attention(given(states(6))[3])
    np.testing.assert_allclose(ours, whole, rtol=1e-5)
    assert (np.asarray(ours).sum(axis=1) < 0.999).all()


def test_without_a_class_token_the_mean_query_gives_the_mean_logit_of_all_patches():
    _, q, k = (jnp.asarray(v[:, 1:]) for v in states(6))
    mean_logit = jnp.einsum("bqc,bkc->bqk", q, k).mean(axis=1) / math.sqrt(WIDTH)
    ours = prumerge.attention(Scores(q.mean(axis=1), k, None))
    np.testing.assert_allclose(ours, jax.nn.softmax(mean_logit, axis=-1), rtol=1e-4)


def test_outliers_are_those_above_the_upper_whisker_and_a_quarter_at_most():
    rng = np.random.default_rng(0)
    for patches in (16, 25, 49, 196, 576, 729):
        heavy = rng.standard_cauchy((20, patches)) ** 3
        tail = np.where(rng.random((20, patches)) < 0.249, 1 + rng.random((20, patches)), 0)
        values = np.float32(np.concatenate([heavy, tail]))
        counts = np.asarray(prumerge.outliers(jnp.asarray(values)))
        assert counts.tolist() == [
            round(twin.outlier_ratio(np.float64(v)) * patches) for v in values
        ]
        assert counts.max() <= patches // 4


# Batches


@pytest.mark.parametrize("ratio", ["adaptive", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_compressed_alike_wherever_it_stands_in_whichever_batch(name, ratio):
    arrays, config = states(7, batch=4), settings(name, ratio)
    together = run(config, 7, given(arrays))
    flipped = run(config, 7, given([v[::-1] for v in arrays]))
    alone = [run(config, 7, given([v[b : b + 1] for v in arrays]))[0] for b in range(4)]
    for ours, other, single in zip(together, flipped[::-1], alone, strict=True):
        assert_same(ours, other)
        assert_same(ours, single)


def test_with_a_ratio_of_the_batch_an_image_depends_on_the_others():
    arrays, config = states(10, batch=4), settings("prumerge", "batch")
    alone = run(config, 10, given([v[:1] for v in arrays]))[0]
    assert len(run(config, 10, given(arrays))[0]["kept"]) > len(alone["kept"])


# Limits and slots


@pytest.mark.parametrize("name", NAMES)
def test_more_slots_than_needed_change_nothing(name):
    arrays = states(10, batch=3)
    roomy = run(settings(name, "adaptive"), 10, given(arrays))
    most = max(len(image["kept"]) for image in roomy)
    slots = {"prumerge": most, "prumerge_plus": 80}[name]
    config = settings(name, "adaptive", max_kept=slots)
    assert compressors.num_tokens(config, 10) == slots + 1 < compressors.num_tokens(settings(name, "adaptive"), 10)  # fmt: skip
    for ours, theirs in zip(run(config, 10, given(arrays)), roomy, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name, slots", [("prumerge", 3), ("prumerge_plus", 20)])
def test_an_image_that_needs_more_slots_keeps_what_one_with_fewer_outliers_would(name, slots):
    arrays = states(10, batch=12)
    roomy = run(settings(name, "adaptive"), 10, given(arrays))[-1]
    limited = run(settings(name, "adaptive", max_kept=slots), 10, given(arrays))[-1]
    assert len(roomy["kept"]) > slots >= len(limited["kept"])
    top = {"prumerge": 3, "prumerge_plus": 5}[name]  # 5 and every (100 // 5 // 3)-th of 100 fit 22
    x, _, k = (v[-1] for v in arrays)
    a = twin.attention(arrays[1][-1, 0], k)[1:]
    if name == "prumerge_plus":
        top = max(n for n in range(1, 26) if n + len(range(0, 100, 100 // n // 3)) <= slots)
    kept, rest = twin.adaptive(a, Fraction(top, 100), name == "prumerge_plus", 100)
    tokens = twin.merge(x[1:], k[1:], a, kept, rest, 5)
    assert_same(limited, {"kept": kept, "complement": rest, "tokens": tokens})


@pytest.mark.parametrize("max_kept", [0, 5, 9, 30, 49])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_an_image_keeps_fits_and_nothing_is_lost(name, max_kept):
    """Every number of outliers from none to a quarter, on a 7 x 7 grid."""
    config = settings(name, "adaptive", max_kept=max_kept)
    place = jax.random.permutation(jax.random.key(0), 49)
    a = (place + jnp.zeros((13, 1))) / 1e3 + 1.0
    choose = jax.jit(prumerge._choose_adaptive, static_argnums=(2, 3))
    chosen = choose(a, jnp.arange(13), config, 7)
    for b in range(13):
        kept = np.asarray(chosen.kept[b])[np.asarray(chosen.valid[b])]
        assert len(kept) == len(set(kept.tolist())) >= 1
        np.testing.assert_array_equal(
            np.sort([*kept, *np.flatnonzero(chosen.rest[b])]), np.arange(49)
        )
        if name == "prumerge":
            limit = min(max_kept or 12, 12)
            assert len(kept) == min(max(b, 1), limit)
            np.testing.assert_array_equal(
                np.sort(np.asarray(place)[kept])[::-1], np.arange(48, 48 - len(kept), -1)
            )


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_outliers_keeps_one_patch(name):
    x, q, k = states(6)
    k[:] = k[:, :1]
    k[:, 8] += 1e-3 * q[:, 0]
    (image, *_) = run(settings(name, "adaptive", neighbours=1), 6, given([x, 0 * q, k]))
    assert len(image["kept"]) == (1 if name == "prumerge" else 3)
    assert np.isfinite(image["tokens"]).all()


# Weights


@pytest.mark.parametrize("ratio", ["adaptive", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_handed_out_are_the_tokens(name, ratio):
    arrays = states(7)
    for b, image in enumerate(run(settings(name, ratio), 7, given(arrays))):
        tokens = image["weights"] @ arrays[0][b, 1:]
        np.testing.assert_allclose(image["tokens"], tokens, atol=1e-5)
        merged = image["weights"][:-1]
        own = merged[np.arange(len(merged)), image["kept"]]
        assert (own >= 1).all() and ((merged > 0).sum(axis=1) <= 6).all()
        np.testing.assert_array_equal(np.flatnonzero(image["weights"][-1]), image["complement"])


def test_bfloat16_survives_large_activations():
    arrays = states(7)
    config = settings("prumerge_plus", "adaptive", dtype="bfloat16")
    large = jax.tree.map(lambda v: (1e3 * v).astype(jnp.bfloat16), given(arrays))
    (tokens, *_), _ = compiled(config, 7)({}, *large)
    assert tokens.dtype == jnp.bfloat16 and bool(jnp.isfinite(tokens).all())


# Counts


@pytest.mark.parametrize(
    "name, fields, tokens",
    [
        ("prumerge", {}, 145), ("prumerge_plus", {}, 577), ("prumerge_plus", {"max_kept": 144}, 145),
        ("prumerge", {"max_kept": 31}, 32), ("prumerge", {"prune_ratio": "fixed"}, 73),
        ("prumerge_plus", {"prune_ratio": "fixed"}, 145), ("prumerge_plus", {"prune_ratio": "fixed", "fixed_ratio": 1 / 16}, 73),
    ],
)  # fmt: skip
def test_slots_of_the_true_size_are_the_published_number(name, fields, tokens):
    assert compressors.num_tokens(compressor_config(name, **fields), 24) == tokens


def published_flops(kept: int, width: int = 1024, hidden: int = 4096) -> float:
    """The release's sum, with the class token's row alone, and the projector."""
    encoder = 2 * 2 * 577 * width**2 + 2 * 577 * width
    merging = 2 * kept * 575 * width + 64 * kept * width + 2 * (576 - kept) * width
    return encoder + merging + 2 * (kept + 1) * (width * hidden + hidden**2)


@pytest.mark.parametrize("name, kept, total", [("prumerge", 31, 3.8), ("prumerge_plus", 143, 8.6)])
def test_flops_are_the_published_number_without_the_queries_nobody_reads(name, kept, total):
    assert round(published_flops(kept) / 1e9, 1) == total
    config = compressor_config(name, max_kept=kept)
    projector = 2 * (kept + 1) * (1024 * 4096 + 4096**2)
    ours = COMPRESSORS[name].flops(config, 24, 1024, 4096) + projector
    # 576 of the 577 queries are saved; merging as one matrix product costs kept x 576 x width instead of a gather.
    unread, product = 2 * 576 * 1024**2, 2 * (kept + 1) * 576 * 1024
    assert ours == pytest.approx(published_flops(kept) - unread + product, rel=0.003)
    assert ours < published_flops(kept)


def test_flops_agree_with_what_the_compiler_counts():
    config, width = compressor_config("prumerge", max_kept=60), 256
    patches, row = jnp.zeros((1, 576, width)), jnp.zeros((1, width))
    module = COMPRESSORS["prumerge"].module(config, 24)
    assert jax.eval_shape(module.init, jax.random.key(0), patches, patches, None, Scores(row, patches, row)) == {}  # fmt: skip
    lowered = jax.jit(module.apply).lower({}, patches, patches, None, Scores(row, patches, row))
    counted = lowered.compile().cost_analysis()["flops"]
    encoder = 2 * 578 * width**2
    own = COMPRESSORS["prumerge"].flops(config, 24, width, 4096) - encoder
    assert counted == pytest.approx(own, rel=0.15)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prune_ratio": "outliers"}, r"prune_ratio 'outliers' is not one of \['adaptive', 'batch', 'fixed'\]"),
        ({"neighbours": 0}, "neighbours must be positive"),
        ({"neighbours": 36}, "neighbours 36 must be fewer than the 36 patches"),
        ({"fixed_ratio": 0.0}, r"fixed_ratio must lie in \(0, 1\], got 0.0"),
        ({"max_kept": -1}, r"max_kept must be 0 \(no limit\) or more, got -1"),
        ({"max_kept": 3}, "prumerge_plus: max_kept 3 holds no image of 36 patches; use 4 or more"),
        ({"prune_ratio": "fixed", "fixed_ratio": 0.6}, "keeps 57 of 36 patches, 21 by score; use one between 0.0278 and 0.5"),
        ({"prune_ratio": "fixed", "fixed_ratio": 0.01}, "keeps 0 of 36 patches"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config = settings("prumerge_plus", **({"ratio": fields.pop("prune_ratio", "adaptive")} | fields))  # fmt: skip
        VLMConfig(presets.vit("mini", image_px=48), config, presets.lm("mini-45k"))
        compressors.num_tokens(config, 6)
    assert "\n" not in str(caught.value)


def test_a_feature_cache_is_refused_wherever_it_could_come_in(tmp_path):
    cfg = tiny.config(tiny.write(tmp_path / "data"))
    compressors.choose(cfg.model.compressor, "prumerge", neighbours=2)
    match = "a cache has no queries and keys, which prumerge looks at; use ''"
    with pytest.raises(ConfigError, match=match):
        features.write_features(cfg, str(tmp_path / "features"))
    cfg.data.features_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=match):
        train.train(cfg, str(tmp_path / "run"))


# Through the whole model


PX, PATCH = 49, 7


def model(compressor: CompressorConfig, preset: str = "clip-l-336") -> VLMConfig:
    vit = presets.vit(
        preset, image_px=PX, patch_px=PATCH, width=12, num_layers=3, num_heads=2, mlp_width=20
    )
    lm = presets.lm("mini-45k", width=24, mlp_width=20, vocab_size=37)
    return VLMConfig(vit, compressor, lm)


def params(config: VLMConfig) -> dict:
    """Random, away from 0 and 1 (drawn here: compiling the initialisers is slow)."""
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(x + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def row(tokens: int, images) -> Inputs:
    """<s>, the image's slots, four words."""
    index = np.full((1, tokens + 5), -1)
    index[0, 1 : 1 + tokens] = range(tokens)
    words = np.where(index < 0, np.cumsum(index < 0, axis=1) + 3, 0)
    positions = np.arange(tokens + 5)[None]
    return Inputs(
        *(jnp.asarray(v, jnp.int32) for v in (words, index, positions, 0 * index)), images=images
    )


@pytest.mark.parametrize(
    "name, preset", [("prumerge", "siglip-b16-224"), ("prumerge_plus", "clip-l-336")]
)
def test_empty_slots_change_no_logit_of_the_text(name, preset):
    """Two images with different numbers of tokens, each against a prompt with just the slots that it fills."""
    config = model(settings(name, "adaptive"), preset)
    slots, variables = compressors.num_tokens(config.compressor, 7), {"params": params(config)}
    apply = functools.partial(jax.jit(VLM(config).apply, static_argnames="method"), variables)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 1, 1, PX, PX, 3)).astype(np.uint8)
    counts = []
    for image in map(jnp.asarray, images):
        visual = apply(row(slots, image), method="encode_images")
        filled = np.flatnonzero(visual.valid[0])
        counts.append(len(filled))
        places = visual.places[:, filled]
        tight = VisualTokens(visual.tokens[:, filled], places=places)
        reference = np.asarray(apply(row(counts[-1], image), tight, method="logits"))[:, -5:]
        ours = np.asarray(apply(row(slots, image)))[:, -5:]
        np.testing.assert_allclose(ours, reference, atol=2e-5 * np.abs(reference).max())
    assert len(set(counts)) == 2 and max(counts) < slots, counts
