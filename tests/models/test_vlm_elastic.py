"""Slots without a visual token do not exist for the decoder: masked = truncated, for logits, losses, gradients, answers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compressor import compressor_config

from vlm_jax import compressors, sharding
from vlm_jax.compressors import with_tokens
from vlm_jax.compressors.modules import m3
from vlm_jax.compressors.modules.visual import VisualTokens
from vlm_jax.costs import flops
from vlm_jax.data import pipeline
from vlm_jax.inference.generate import Decoding, make_generate
from vlm_jax.models.lm import empty_cache
from vlm_jax.models.vlm import VLM, Inputs, Layout, init_params
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import VLMConfig
from vlm_jax.storage import run as experiment
from vlm_jax.training import losses, optim, step

PX, PATCH, VOCAB = 24, 6, 37
GRID = PX // PATCH


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config(name: str, count: int = 0, **fields) -> VLMConfig:
    lm = presets.lm(
        "vicuna-7b", vocab_size=VOCAB, width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20,
        sliding_window=9,
    )  # fmt: skip
    vit = presets.vit("mini", image_px=PX, patch_px=PATCH, width=8, num_heads=2, mlp_width=12)
    stride = 2 if name == "quecc" else 1
    compressor = compressor_config(name, stride, 2, visual_tokens=count, query_grid=4, **fields)
    return VLMConfig(vit, compressor, lm, projector_norm="rms", projector_positions="grid")


@functools.cache
def params_of(name: str):
    """The same for every number of tokens."""
    return random_params(config(name))


def random_params(cfg: VLMConfig):
    """Every bias and norm away from 0 and 1 (drawn here: compiling init is slow)."""
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = 0.25 * rng.standard_normal(leaf.shape)
        return jnp.asarray(x + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def method(cfg: VLMConfig, name: str = "__call__"):
    return jax.jit(functools.partial(VLM(cfg).apply, method=name))


def batch(slots: int, pad: int = 0, behind: int = 2) -> Inputs:
    """Row 0 shows two images of `slots` slots, row 1 the second of its two; `behind` tokens follow the last image. Rows are
    padded on the left, the longest by `pad`.
    """
    rng = np.random.default_rng(1)
    words = [[(int(word), -1) for word in rng.integers(3, VOCAB, 9)] for _ in range(2)]
    shown = [[(0, i * slots + m) for m in range(slots)] for i in range(2)]
    rows = [
        [*words[0][:2], *shown[0], *words[0][2:5], *shown[1], *words[0][5 : 5 + behind]],
        [*words[1][:3], *shown[1], *words[1][3 : 3 + behind]],
    ]
    length = len(rows[0]) + pad
    padded = np.array([[(0, -1)] * (length - len(row)) + row for row in rows])
    real = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Inputs(
        tokens=jnp.asarray(padded[..., 0], jnp.int32),
        visual_index=jnp.asarray(padded[..., 1], jnp.int32),
        positions=jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0), jnp.int32),
        segments=jnp.asarray(np.where(real, 0, -1), jnp.int32),
        images=jnp.asarray(rng.integers(0, 256, (2, 2, PX, PX, 3)), jnp.uint8),
        query_tokens=jnp.full((2, 2, 3), 5, jnp.int32).at[:, :, 0].set(jnp.array([[4, 6], [7, 8]])),
        query_mask=jnp.arange(3) < jnp.array([[3, 2], [1, 3]])[..., None],
    )


def text_logits(logits, inputs: Inputs) -> list[np.ndarray]:
    """Logits of each row at its text, and at the slot that predicts the text behind an image."""
    index, segments = np.asarray(inputs.visual_index), np.asarray(inputs.segments)
    last = (index >= 0) & (np.roll(index, -1, axis=1) != index + 1)
    seen = ((index < 0) & (segments >= 0)) | last
    return [np.asarray(row)[keep] for row, keep in zip(logits, seen, strict=True)]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()


CASES = [
    ("mqt", 1),
    ("mqt", 5),
    ("mqt", 16),
    ("m3", 1),
    ("m3", 4),
    ("m3", 16),
    ("querypool", 1),
    ("querypool", 4),
]


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("name, count", CASES)
def test_logits_at_the_text_equal_a_model_with_fewer_slots(name, count, pad):
    params = {"params": params_of(name)}
    whole, short = batch(16, pad), batch(count)
    masked = method(config(name))(params, whole._replace(count=jnp.int32(count)))
    truncated = method(config(name, count))(params, short)
    assert_same(text_logits(masked, whole), text_logits(truncated, short))
    if count < 16:
        everything = text_logits(method(config(name))(params, whole), whole)
        assert np.abs(everything[0] - text_logits(masked, whole)[0]).max() > 1e-2


@pytest.mark.parametrize("behind", [2, 0])  # 0: a prompt that ends in an image
@pytest.mark.parametrize("name, count", [("mqt", 5), ("m3", 4), ("querypool", 4)])
def test_prefill_and_decode_equal_a_model_with_fewer_slots(name, count, behind):
    params = {"params": params_of(name)}
    made = []
    for cfg, inputs in (
        (config(name), batch(16, 2, behind)._replace(count=jnp.int32(count))),
        (config(name, count), batch(count, 0, behind)),
    ):
        length = inputs.tokens.shape[1]
        cache = empty_cache(cfg.lm, 2, length + 2)
        first, cache, layout = method(cfg, "prefill")(params, inputs, cache)
        following = layout.positions[:, -1:] + jnp.array([[1, 2]])
        slots = Layout(
            jnp.concatenate([layout.positions, following], axis=1),
            jnp.pad(layout.segments, ((0, 0), (0, 2))),
        )
        second, _ = method(cfg, "decode")(
            params, jnp.array([3, 4], jnp.int32), jnp.int32(length), slots, cache
        )
        made.append([np.asarray(first), np.asarray(second)])
    assert_same(*made)


def test_any_set_of_filled_slots_equals_a_row_of_those_alone():
    params = {"params": params_of("m3")}
    inputs, rng = batch(16), np.random.default_rng(4)
    count = 5
    valid = rng.permuted(np.tile(np.arange(16) < count, (4, 1)), axis=1)
    tokens = rng.standard_normal((4, 16, 24))
    places = np.tile(np.arange(16), (4, 1))
    visual = VisualTokens(jnp.asarray(tokens, jnp.float32), jnp.asarray(valid), jnp.asarray(places))
    kept = VisualTokens(
        jnp.asarray(tokens[valid].reshape(4, count, 24), jnp.float32),
        places=jnp.asarray(places[valid].reshape(4, count)),
    )
    read = method(config("m3"), "logits")
    short = batch(count)
    assert_same(
        text_logits(read(params, inputs, visual), inputs),
        text_logits(read(params, short, kept), short),
    )
    poisoned = jnp.where(jnp.asarray(valid)[..., None], visual.tokens, 1e6)
    np.testing.assert_array_equal(
        text_logits(read(params, inputs, visual), inputs)[0],
        text_logits(read(params, inputs, visual._replace(tokens=poisoned)), inputs)[0],
    )


def test_a_compressor_with_one_number_of_tokens_cannot_be_asked_for_another():
    with pytest.raises(ValueError, match="quecc cannot show a part of its tokens"):
        method(config("quecc"))(
            {"params": params_of("quecc")}, batch(4)._replace(count=jnp.int32(1))
        )


@pytest.mark.slow
@pytest.mark.parametrize("name, counts", [("mqt", (3, 16)), ("m3", (1, 4))])
def test_answers_for_any_count_come_from_one_compilation_and_equal_a_smaller_model(name, counts):
    params, seeds = params_of(name), jnp.zeros(2, jnp.int32)
    decoding = Decoding(4, (2,), 0)
    generator = make_generate(config(name), decoding)
    for count in counts:
        answers = generator(params, batch(16, 1)._replace(count=jnp.int32(count)), seeds)
        alone = make_generate(config(name, count), decoding)(params, batch(count), seeds)
        np.testing.assert_array_equal(answers, alone)
    assert generator.compilations == 1


# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("elastic") / "data")


def experiment_of(folder, name: str, train_tokens=(), query_grid: int = 2):
    c = tiny.config(folder, num_steps=6)
    own = {"query_grid": query_grid} if name == "mqt" else {}
    compressors.choose(c.model.compressor, name, train_tokens=train_tokens, **own)
    c.data.template = "plain"  # the caption stands right behind the image
    c.data.turns = "independent"
    return experiment.resolve(c)


def first_batch(exp):
    slots = compressors.train_tokens(exp.model.compressor, exp.model.vit.grid)[0]
    iterator = pipeline.train_iterator(exp.data, slots, exp.model.vit)
    made = next(iterator)
    iterator.close()
    return {k: jnp.asarray(v) for k, v in made.items() if isinstance(v, np.ndarray)}


def loss_and_gradient(exp, number: int = 0):
    """Of the first batch, in parameters that do not depend on the number of tokens."""
    loss = jax.value_and_grad(losses.make_loss(exp), has_aux=True)
    loss = jax.jit(loss, compiler_options=step.QUICK_COMPILE)
    (value, scalars), grads = loss(random_params(exp.model), first_batch(exp), jnp.int32(number))
    return float(value), scalars, grads


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1])
def test_the_loss_of_a_drawn_count_is_that_of_a_model_trained_for_it(folder, step):
    loss, scalars, grads = loss_and_gradient(experiment_of(folder, "mqt", (1, 3, 4)), step)
    count = int(scalars["visual_tokens"])
    alone = loss_and_gradient(experiment_of(folder, "mqt", (count,)))
    assert loss == pytest.approx(alone[0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, alone[2])
    tail = np.asarray(grads["compressor"]["query"])[count:]
    assert not tail.any()  # queries that are not shown learn nothing


def test_counts_are_drawn_evenly_from_the_seed_and_the_step(folder):
    exp = experiment_of(folder, "mqt", (1, 2, 4))
    loss, made = jax.jit(losses.make_loss(exp)), first_batch(exp)
    params = random_params(exp.model)
    draw = lambda step: int(loss(params, made, jnp.int32(step))[1]["visual_tokens"])  # noqa: E731
    drawn = [draw(step) for step in range(150)]
    assert drawn[:20] == [draw(step) for step in range(20)]
    counts = np.bincount(drawn, minlength=5)
    assert counts.sum() == counts[[1, 2, 4]].sum() == 150 and counts[[1, 2, 4]].min() > 30
    assert loss._cache_size() == 1


@pytest.mark.slow
def test_the_loss_of_m3_is_the_mean_over_its_scales(folder):
    whole = loss_and_gradient(experiment_of(folder, "m3", (4, 1)))
    alone = [loss_and_gradient(experiment_of(folder, "m3", (n,))) for n in (4, 1)]
    assert whole[0] == pytest.approx(np.mean([a[0] for a in alone]), rel=1e-5)
    assert abs(alone[0][0] - alone[1][0]) > 1e-4
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(a[2] for a in alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[2], mean)


def test_m3_runs_encoder_and_projector_once_however_many_scales(folder):
    def products(train_tokens):
        exp = experiment_of(folder, "m3", train_tokens)
        params = jax.eval_shape(lambda: nn.unbox(init_params(exp.model, jax.random.key(1))))
        loss = lambda p, b: losses.make_loss(exp)(p, b, jnp.int32(0))  # noqa: E731
        return str(jax.make_jaxpr(loss)(params, first_batch(exp))).count("dot_general")

    assert products((4, 1)) == products((4,))  # the decoder is traced once, too


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mqt", "m3"])
def test_a_training_step_with_changing_counts_compiles_once_and_learns(folder, name):
    exp = experiment_of(folder, name, (1, 4))
    plan = step.plan(exp, sharding.make_mesh(exp.mesh), 40)
    state, update, made = step.fresh_state(plan), step.make_step(plan), first_batch(exp)
    found, counts = [], set()
    with sharding.use(plan.mesh):
        for _ in range(40):
            state, scalars = update(state, made)
            found.append(float(scalars["loss"]))
            counts |= {int(scalars["visual_tokens"])} if name == "mqt" else set()
    assert update._cache_size() == 1 and found[-1] < found[0] / 2
    assert counts == ({1, 4} if name == "mqt" else set())
    assert optim.merge(state.trainable, state.frozen).keys() >= {"vit", "lm"}


# What reads the question


def query(name_fields: dict, inputs: Inputs):
    cfg = config("quecc", **name_fields)
    return np.asarray(method(cfg, "query")({"params": params_of("quecc")}, inputs))


def test_the_first_layers_read_the_question_as_a_decoder_of_that_depth():
    inputs = batch(4)
    cfg = config("quecc", query_layers=1)
    shallow = dataclasses.replace(config("quecc"), lm=dataclasses.replace(cfg.lm, num_layers=1))
    params = dict(params_of("quecc"))
    params["lm"] = params["lm"] | {"layers": jax.tree.map(lambda x: x[:1], params["lm"]["layers"])}
    theirs = np.asarray(method(shallow, "query")({"params": params}, inputs))
    np.testing.assert_allclose(query({"query_layers": 1}, inputs), theirs, atol=1e-6)
    whole = query({}, inputs)
    np.testing.assert_allclose(query({"query_layers": 2}, inputs), whole, atol=1e-6)
    assert np.abs(theirs - whole).max() > 1e-2


def test_without_layers_the_question_is_the_mean_of_its_embeddings():
    inputs = batch(4)
    ours = query({"query_layers": 0}, inputs)
    lm = params_of("quecc")["lm"]
    for row in range(2):
        for image in range(2):
            kept = np.asarray(inputs.query_tokens[row, image])[inputs.query_mask[row, image]]
            mean = np.float64(lm["embed"])[kept].mean(axis=0)
            normed = mean / np.sqrt((mean**2).mean() + 1e-5) * np.float64(lm["final_norm"]["scale"])
            np.testing.assert_allclose(ours[2 * row + image], normed, atol=1e-5)


def test_no_question_is_zeros_and_costs_no_pass_of_the_decoder():
    inputs = batch(4)
    none = inputs._replace(
        query_tokens=inputs.query_tokens[..., :0], query_mask=inputs.query_mask[..., :0]
    )
    found = query({}, none)
    assert found.shape == (4, 24) and not found.any()
    text = str(jax.make_jaxpr(VLM(config("quecc")).apply)({"params": params_of("quecc")}, none))
    assert text.count("scan[") == 2  # the encoder's layers and the decoder's


def test_flops_of_the_question_are_those_of_the_layers_that_read_it():
    def cost(layers, tokens):
        cfg = config("quecc", query_layers=layers)
        return flops.forward_flops(cfg, text_tokens=9, query_tokens=tokens).query

    lm = config("quecc").lm
    assert cost(-1, 7) == cost(2, 7) == flops.decoder_flops(lm, 7, 7, 0) == 2 * cost(1, 7) > 0
    assert cost(0, 7) == cost(-1, 0) == 0
    with pytest.raises(ConfigError, match=r"quecc: query_layers 3 must lie in \[-1, 2\]"):
        config("quecc", query_layers=3)
    assert with_tokens(compressor_config("quecc"), 4, 4).stride == 2


PLACES = {"identity": 16, "quecc": 4, "m3": 16, "mqt": 16, "querypool": 16, "prumerge": 17}


@pytest.mark.parametrize("name", PLACES)
def test_the_table_of_positions_does_not_change_with_the_tokens_shown(name):
    fields = {"neighbours": 4, "max_kept": 3} if name == "prumerge" else {}
    for count in (0, 4) if name in ("m3", "mqt", "querypool") else (0,):
        shapes = jax.eval_shape(
            functools.partial(init_params, config(name, count, **fields)), jax.random.key(0)
        )
        assert nn.unbox(shapes)["projector"]["position"].shape == (PLACES[name], 24)


def test_a_coarse_token_stands_in_the_middle_of_its_window():
    assert m3.centres(4, 1).tolist() == list(range(16))
    assert m3.centres(4, 2).tolist() == [5, 7, 13, 15]
    assert m3.centres(4, 4).tolist() == [10]
    assert m3.centres(3, 3).tolist() == [4]
    shown = m3.M3.show(VisualTokens(jnp.arange(32.0).reshape(1, 16, 2)), jnp.int32(4))
    assert shown.places[0, :4].tolist() == [5, 7, 13, 15]


@pytest.mark.slow
def test_a_kept_patch_brings_the_position_of_its_place():
    """PruMerge's tokens, in the order of their scores, each with the code of its patch; the extra token has its own."""
    cfg = config("prumerge", neighbours=4, prune_ratio="fixed", fixed_ratio=0.25)
    params = random_params(cfg)
    inputs = batch(5)
    model = VLM(cfg).bind({"params": params})
    visual = model.encode_images(inputs)
    assert visual.places.shape == (4, 5) and visual.places[:, -1].tolist() == [16] * 4
    assert all(len(set(row)) == 5 for row in visual.places.tolist())
    plain = model.projector.finish(visual.tokens * 0, visual.places)
    table = params["projector"]["position"]
    np.testing.assert_allclose(plain, table[visual.places], rtol=1e-6)
