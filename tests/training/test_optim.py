"""Which parameters move, by which rule, and how fast."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import default, mini
from vlm_jax import compressors
from vlm_jax.hf import named
from vlm_jax.models.vlm import init_params
from vlm_jax.settings.checks import ConfigError, build
from vlm_jax.settings.run import OptimConfig
from vlm_jax.training.optim import make_optimizer, merge, muon_axes, partition, schedule

STAGE_1, STAGE_2 = "^(compressor|projector)/", "^(compressor|projector|lm)/"


def boxed(shape, names):
    values = jax.random.normal(jax.random.key(len(shape) * 100 + shape[-1]), shape)
    return nn.LogicallyPartitioned(values, names)


def tree():
    """The shapes of a small model: 2 layers, width 6, 3 heads of 4."""
    q = {
        "kernel": boxed((2, 6, 3, 4), ("layers", "embed", "heads", None)),
        "bias": boxed((2, 3, 4), ("layers", "heads", None)),
    }
    o = {"kernel": boxed((2, 3, 4, 6), ("layers", "heads", None, "embed"))}
    up = {"kernel": boxed((2, 6, 10), ("layers", "embed", "mlp"))}
    return {
        "vit": {"patch": {"kernel": boxed((8, 5), (None, "vision"))}},
        "compressor": {"proj": {"kernel": boxed((5, 5), (None, "vision")), "bias": boxed((5,), ("vision",))}},
        "projector": {"dense_0": {"kernel": boxed((5, 6), ("vision", "mlp"))}},
        "lm": {"embed": boxed((9, 6), ("vocab", "embed")), "layers": {"attn": {"q": q, "o": o}, "mlp": {"up": up}}},
    }  # fmt: skip


def config(**changes):
    fields = dict(
        trainable=STAGE_2, optimizer="adamw", learning_rate=1e-2, muon_learning_rate=2e-2, warmup_ratio=0.0,
        weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, clip_norm=1e9,
    )  # fmt: skip
    return OptimConfig(**(fields | changes))


def paths(tree):
    return sorted(flatten_dict(tree, sep="/"))


def test_stage_1_trains_compressor_and_projector_and_stage_2_also_the_decoder():
    params = nn.unbox(tree())
    trainable, frozen = partition(params, STAGE_1)
    assert set(trainable) == {"compressor", "projector"} and set(frozen) == {"vit", "lm"}
    trainable, frozen = partition(params, STAGE_2)
    assert set(trainable) == {"compressor", "projector", "lm"} and set(frozen) == {"vit"}
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), merge(trainable, frozen), params)
    )


def test_a_regex_may_cut_through_a_part():
    trainable, frozen = partition(nn.unbox(tree()), "lm/layers/.*/kernel")
    assert paths(trainable) == [f"lm/layers/{x}/kernel" for x in ("attn/o", "attn/q", "mlp/up")]
    assert "lm/embed" in paths(frozen) and "lm/layers/attn/q/bias" in paths(frozen)


def test_a_regex_that_matches_nothing_names_the_parts():
    with pytest.raises(
        ConfigError,
        match="'mm_projector' matches no parameter; paths begin with compressor/, lm/, projector/, vit/",
    ):
        partition(nn.unbox(tree()), "mm_projector")
    with pytest.raises(ConfigError, match="not a regular expression"):
        partition(nn.unbox(tree()), "(lm")


def test_the_schedule_is_warm_up_then_half_a_cosine_to_zero():
    rate = schedule(2.0, 100, 0.03)  # ceil(3) warm-up steps
    assert [float(rate(i)) for i in (0, 1, 2, 3)] == pytest.approx([0, 2 / 3, 4 / 3, 2], abs=1e-6)
    for i in (10, 50, 99):
        assert float(rate(i)) == pytest.approx(1 + np.cos(np.pi * (i - 3) / 97), abs=1e-6)
    assert float(rate(100)) == 0
    assert float(schedule(2.0, 100, 0.025)(2)) == pytest.approx(
        4 / 3, abs=1e-6
    )  # 2.5 steps round up to 3
    assert float(schedule(2.0, 100, 0.0)(0)) == 2


def test_a_decay_ratio_keeps_the_rate_at_its_peak_and_ends_linearly():
    rate = schedule(2.0, 100, 0.1, 0.4)
    steps = {0: 0, 5: 1, 10: 2, 59: 2, 60: 2, 80: 1, 100: 0}
    assert [float(rate(i)) for i in steps] == pytest.approx(list(steps.values()), abs=1e-6)
    assert [float(schedule(2.0, 4, 0.0, 1.0)(i)) for i in range(5)] == [2, 1.5, 1, 0.5, 0]


def test_a_decay_that_begins_within_the_warm_up_is_refused():
    with pytest.raises(ConfigError, match=r"decay_ratio must lie between 0 and .* = 0.9, got 0.95"):
        build(OptimConfig, default.optim().to_dict() | {"warmup_ratio": 0.1, "decay_ratio": 0.95})


def test_frozen_parameters_have_no_optimiser_state():
    trainable, _ = partition(nn.unbox(tree()), STAGE_1)
    chosen = partition(tree(), STAGE_1)[0]
    total = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    kernels = 5 * 5 + 5 * 6
    moments = {"adamw": 2 * total, "muon": 2 * (total - kernels) + kernels}  # Muon keeps one moment
    for kind, expected in moments.items():
        state = make_optimizer(config(optimizer=kind), 10, chosen).init(trainable)
        leaves = jax.tree.leaves(state)
        assert (
            sum(x.size for x in leaves if x.ndim and x.shape != (5, 3)) == expected
        )  # Newton-Schulz


def test_adamw_is_the_textbook_update():
    params, (chosen, _) = nn.unbox(tree()), partition(tree(), STAGE_2)
    trainable, _ = partition(params, STAGE_2)
    optimizer = make_optimizer(config(weight_decay=0.1), 4, chosen)
    state, grads = optimizer.init(trainable), jax.tree.map(lambda x: x * 2 + 1, trainable)
    updates, _ = optimizer.update(grads, state, trainable)
    kernel, bias = (nn.unbox(chosen)["compressor"]["proj"][name] for name in ("kernel", "bias"))
    sign = lambda x: np.sign(np.asarray(x) * 2 + 1)  # noqa: E731 (the first step of Adam)
    got = updates["compressor"]["proj"]
    np.testing.assert_allclose(got["kernel"], -1e-2 * (sign(kernel) + 0.1 * kernel), rtol=1e-4)
    np.testing.assert_allclose(got["bias"], -1e-2 * sign(bias), rtol=1e-4)  # no decay on biases


def test_the_gradient_is_clipped_by_its_global_norm():
    trainable, _ = partition(nn.unbox(tree()), STAGE_1)
    optimizer = make_optimizer(config(clip_norm=0.5, beta1=0.0), 4, partition(tree(), STAGE_1)[0])
    clip = optax.clip_by_global_norm(0.5)
    grads = jax.tree.map(
        lambda x: 1e-9 * x, trainable
    )  # far below the clip: untouched, but Adam's eps notices size
    small, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    big, _ = optimizer.update(
        jax.tree.map(lambda x: 1e12 * x, grads), optimizer.init(trainable), trainable
    )
    clipped, _ = clip.update(jax.tree.map(lambda x: 1e12 * x, grads), clip.init(trainable))
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)
    again, _ = optimizer.update(clipped, optimizer.init(trainable), trainable)
    np.testing.assert_allclose(
        big["projector"]["dense_0"]["kernel"], again["projector"]["dense_0"]["kernel"], rtol=1e-5
    )
    assert not np.allclose(
        small["projector"]["dense_0"]["kernel"], big["projector"]["dense_0"]["kernel"], rtol=1e-3
    )


def test_muon_takes_hidden_kernels_as_matrices_and_nothing_else():
    spec = optax.contrib.MuonDimensionNumbers
    axes = muon_axes(tree())
    assert axes["lm"]["layers"]["attn"]["q"]["kernel"] == spec((1,), (2, 3))
    assert axes["lm"]["layers"]["attn"]["o"]["kernel"] == spec((1, 2), (3,))
    assert axes["lm"]["layers"]["mlp"]["up"]["kernel"] == spec((1,), (2,))
    assert axes["lm"]["embed"] is None and axes["lm"]["layers"]["attn"]["q"]["bias"] is None
    assert axes["compressor"]["proj"]["kernel"] == spec((0,), (1,))
    assert axes["projector"]["dense_0"]["kernel"] == spec((0,), (1,))


def test_muon_leaves_quecc_s_filter_and_the_patch_embedding_to_adam():
    model = named.vlm(mini.get_config().model.to_dict())
    model = dataclasses.replace(
        model,
        compressor=compressors.chosen(dataclasses.asdict(model.compressor) | {"name": "quecc"}),
    )
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    axes = flatten_dict(muon_axes(boxed), sep="/")
    assert axes["compressor/downsample/filter"] is None and axes["vit/patch_embed/kernel"] is None
    assert axes["vit/position"] is None and axes["lm/head"] is None
    spec = optax.contrib.MuonDimensionNumbers
    assert axes["compressor/attention/out/kernel"] == spec((0, 1), (2,))
    assert axes["vit/layers/attn/out/kernel"] == spec((1, 2), (3,))
    assert all(spec is None for path, spec in axes.items() if path.endswith(("bias", "scale")))


def test_a_muon_update_is_near_orthogonal_per_layer_and_scaled_by_its_own_rate():
    params, (chosen, _) = nn.unbox(tree()), partition(tree(), STAGE_2)
    trainable, _ = partition(params, STAGE_2)
    optimizer = make_optimizer(config(optimizer="muon"), 4, chosen)
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    q = np.asarray(updates["lm"]["layers"]["attn"]["q"]["kernel"]).reshape(2, 6, 12)
    for (
        layer
    ) in q:  # Newton-Schulz drives the singular values near 1; width scaling is sqrt(12 / 6)
        values = np.linalg.svd(layer, compute_uv=False) / (2e-2 * np.sqrt(2))
        assert values.min() > 0.6 and values.max() < 1.3
    embed = np.abs(np.asarray(updates["lm"]["embed"]))
    np.testing.assert_allclose(embed, 1e-2, rtol=1e-4)  # AdamW's first step: the rate itself
    assert jnp.isfinite(optax.tree.norm(updates))


def test_a_muon_update_never_changes_the_size_of_an_output_by_more_than_the_rate():
    """A wide MLP's last map, [40, 6] and [640, 6]: the root mean square of (update x) over that of x, along the worst x."""
    for wide in (40, 640):
        kernel = boxed((2, wide, 6), ("layers", "mlp", "embed"))
        boxes = {"lm": {"layers": {"mlp": {"down": {"kernel": kernel}}}}}
        params = nn.unbox(boxes)
        optimizer = make_optimizer(config(optimizer="muon"), 4, boxes)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        for layer in np.asarray(updates["lm"]["layers"]["mlp"]["down"]["kernel"]):
            largest = np.linalg.svd(layer, compute_uv=False).max()
            gain = largest * np.sqrt(
                wide / 6
            )  # rms(y) / rms(x) = |y| / |x| * sqrt(inputs / outputs)
            assert 0.6 * 2e-2 < gain < 1.3 * 2e-2


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_rates_slow_the_parameters_that_they_match_the_first_match_counts(optimizer):
    params, (chosen, _) = nn.unbox(tree()), partition(tree(), STAGE_2)
    trainable, _ = partition(params, STAGE_2)

    def updates(**fields):
        rule = make_optimizer(config(optimizer=optimizer, weight_decay=0.1, **fields), 4, chosen)
        return flatten_dict(rule.update(trainable, rule.init(trainable), trainable)[0], sep="/")

    plain = updates()
    slowed = updates(rates=(["mlp/", 0.25], ["^lm/", 0.5]))
    for path, update in plain.items():
        factor = 0.25 if "mlp/" in path else 0.5 if path.startswith("lm/") else 1.0
        np.testing.assert_allclose(slowed[path], factor * update, rtol=1e-6)
        assert np.abs(update).max() > 0


@pytest.mark.parametrize(
    "rates, said",
    [
        ((("^lm/", 0.0),), r"rates '\^lm/' must be positive, got 0.0"),
        (("^lm/",), r"rates must be pairs \(regex, factor\)"),
        (
            (("^vit/", 0.1),),
            r"rates '\^vit/' matches no parameter; paths begin with compressor/, lm/",
        ),
        ((("(", 0.1),), r"rates '\(' is not a regular expression"),
    ],
)
def test_rates_that_cannot_be_meant_are_named(rates, said):
    with pytest.raises(ConfigError, match=said):
        make_optimizer(config(rates=rates), 4, partition(tree(), STAGE_2)[0])
