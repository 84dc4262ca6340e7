"""The picture of what visual tokens look at: drawn from the trained model's own weights, or refused in one line."""

import logging
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax import compressors, show, train
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.data import images
from vlm_jax.inference import answer, views
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.models.vlm import VLM, Inputs, shapes
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment

GRID = 4
QUESTION = "What colour is this ?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of data with a picture that has parts, `parts.jpg`, twice as wide as high."""
    directory = tiny.write(tmp_path_factory.mktemp("world") / "data")
    picture = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)
    Image.fromarray(picture).resize((80, 40), Image.Resampling.NEAREST).save(
        directory / "parts.jpg"
    )
    return directory


@pytest.fixture(scope="module")
def trained(world):
    """Workdirs of models with the named compressor, each trained for one step when it is first asked for."""
    made = {}

    def workdir(name: str) -> str:
        if name not in made:
            cfg = tiny.config(world, num_steps=1, save_every=1)
            cfg.model.vit.image_px = 8 * GRID
            fields = {"neighbours": 3, "query_grid": 3}
            own = {
                field: fields[field] for field in fields if field in compressors.settings_of(name)
            }
            compressors.choose(cfg.model.compressor, name, **own)
            made[name] = str(world.parent / name)
            train.train(cfg, made[name])
        return made[name]

    return workdir


def own_weights(world, checkpoint: str) -> dict:
    """What the compressor sows when it is called by itself on the picture as the model reads it."""
    model = answer.Answerer(EvalConfig(checkpoint, 1, 1), MeshConfig())
    vit, name = model.model.vit, model.model.compressor.name
    pixels = images.load(str(world / "parts.jpg"), vit.image_px, "pad", vit.mean, 10**6)
    tokens = [tiny.WORDS.index(word) for word in ("<s>", *QUESTION.split())]
    one = np.zeros((1, 1), np.int32)
    inputs = Inputs(
        one, one, one, one, images=pixels[None, None], query_tokens=np.array([[tokens]], np.int32),
        query_mask=np.ones((1, 1, len(tokens)), bool),
    )  # fmt: skip
    inputs, variables = jax.tree.map(jax.numpy.asarray, inputs), {"params": model.params}

    def call(method):
        return jax.jit(lambda v, i: VLM(model.model).apply(v, i, method=method))(variables, inputs)

    features, query = call("features"), call("query")
    width = (model.model.lm.width,) if COMPRESSORS[name].place == "instead" else ()
    module = COMPRESSORS[name].module(model.model.compressor, vit.grid, *width)
    _, sown = module.apply(
        {"params": model.params["compressor"]} if "compressor" in model.params else {},
        features.last, features.taps, query, features.scores, mutable="intermediates",
    )  # fmt: skip
    return jax.tree.map(lambda x: np.asarray(x[0]), sown["intermediates"])


def drawn(world, checkpoint: str, out, monkeypatch, *more: str):
    """(what was shown, the figure) of a whole run of the command."""
    kept, original = [], views.draw

    def spy(name, picture, grid, shown, question, text):
        figure = original(name, picture, grid, shown, question, text)
        kept.extend([shown, figure, picture])
        return figure

    monkeypatch.setattr(views, "draw", spy)
    words = ["--config=configs/eval.py", f"--config.eval.checkpoint={checkpoint}", str(world / "parts.jpg")]  # fmt: skip
    words += ["--question", QUESTION, f"--out={out}", "--config.eval.max_new_tokens=2"]
    assert show.main([*words, *more]) == 0
    return kept


def array(axes) -> np.ndarray:
    """The numbers over the picture."""
    return np.asarray(axes.images[-1].get_array())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_run_that_names_another_machines_kernel_answers_as_it_does_here(
    world, trained, tmp_path, caplog, kernel
):
    """QueCC reads the question with the decoder, whose kernel the run's config names."""
    shutil.copytree(trained("quecc"), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"attention": "auto"', f'"attention": "{kernel}"'))
    saved = experiment.read(tmp_path / "run").model
    assert saved.lm.attention == kernel and shapes(saved).keys() == {
        "vit",
        "compressor",
        "projector",
        "lm",
    }
    row = {"id": "a", "image": "parts.jpg", "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}]}  # fmt: skip
    told = []
    caplog.clear()  # what the training said
    with caplog.at_level(logging.INFO, logger="vlm_jax"):
        for checkpoint in (trained("quecc"), str(tmp_path / "run")):
            answerer = answer.Answerer(EvalConfig(checkpoint, 1, 2), MeshConfig())
            (answers,) = answerer.ask([row], str(world), 1)
            told.append((answers, views.look(answerer, row, str(world)).weights.tolist()))
    assert told[0] == told[1]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("vlm_jax")]
    assert ours == [
        f"the run was trained with model.lm.attention={kernel}, which this machine (cpu) does not have: here it is xla"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quecc", "tokenpacker"])
def test_windows_are_drawn_with_the_models_own_weights(
    world, trained, tmp_path, monkeypatch, capsys, name
):
    (weights,) = own_weights(world, trained(name))["attention"]["weights"]
    shown, figure, picture = drawn(world, trained(name), tmp_path / "w.png", monkeypatch)
    assert capsys.readouterr().out == f"{tmp_path / 'w.png'}\n"
    assert weights.shape == (4, 2, 2, 2) and np.abs(weights - 0.25).max() > 1e-3
    expected = np.zeros((2, GRID, GRID))  # head, row, column
    for m, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        expected[:, row : row + 2, column : column + 2] = weights[m]
        of_token = shown.weights[m].reshape(GRID, GRID)
        np.testing.assert_allclose(of_token[row : row + 2, column : column + 2], weights[m].mean(axis=0), atol=1e-5)  # fmt: skip
        assert of_token.sum() == pytest.approx(1, abs=1e-5)
    large, original, *heads = figure.axes[:4]
    np.testing.assert_allclose(array(large), 4 * expected.mean(axis=0), atol=1e-4)
    np.testing.assert_array_equal(array(original), picture)
    for axes, values in zip(heads, expected, strict=True):
        np.testing.assert_allclose(array(axes), 4 * values, atol=1e-4)
    with Image.open(tmp_path / "w.png") as image:
        assert min(image.size) > 500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_prumerge_is_drawn_with_the_patches_it_kept_and_merged(
    world, trained, tmp_path, monkeypatch, name
):
    sown = own_weights(world, trained(name))
    (weights,), (chosen,) = sown["weights"], sown["chosen"]
    shown, figure, _ = drawn(world, trained(name), tmp_path / "p.svg", monkeypatch)
    count = int(chosen.valid.sum())
    assert name == "prumerge" or 3 < count < len(chosen.valid)
    np.testing.assert_array_equal(shown.kept, chosen.kept[:count])
    np.testing.assert_allclose(shown.weights[:-1], weights[:count], atol=1e-5)
    np.testing.assert_allclose(shown.weights[-1], weights[-1], atol=1e-5)
    fates = array(figure.axes[0]).ravel()
    np.testing.assert_array_equal(np.flatnonzero(fates == 2), np.sort(shown.kept))
    merged = set(np.flatnonzero(weights[:count].max(axis=0))) - set(shown.kept.tolist())
    np.testing.assert_array_equal(np.flatnonzero(fates == 1), sorted(merged))
    first, extra = figure.axes[2], figure.axes[2 + count]
    own = np.eye(GRID**2)[shown.kept[0]] * weights[0]
    np.testing.assert_allclose(array(first).ravel(), weights[0] - own, atol=1e-5)
    np.testing.assert_allclose(array(extra).ravel(), weights[-1], atol=1e-5)
    frame = first.patches[0]
    assert frame.get_xy() == (shown.kept[0] % GRID, shown.kept[0] // GRID)


@pytest.mark.slow
def test_queries_are_drawn_with_the_models_own_weights(world, trained, tmp_path, monkeypatch):
    (weights,) = own_weights(world, trained("mqt"))["weights"]
    assert weights.shape == (2, 9, GRID**2)
    few = ["--config.eval.visual_tokens=5"]
    shown, figure, _ = drawn(world, trained("mqt"), tmp_path / "q.png", monkeypatch, *few)
    np.testing.assert_allclose(shown.weights, weights[:, :5].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(array(figure.axes[2]).ravel(), GRID**2 * shown.weights[0], atol=1e-4)
    assert "5 visual tokens" in figure.get_suptitle()


# Layouts that need no model


def test_queries_are_drawn_one_by_one_and_on_average():
    weights = np.random.default_rng(0).dirichlet(np.ones(16), (2, 40)).astype(np.float32)
    shown = views.VIEWS["queries"].read({"weights": (weights,)}, GRID, 40)
    np.testing.assert_allclose(shown.weights, weights.mean(axis=0))
    figure = views.draw("mqt", np.zeros((8, 8, 3), np.uint8), GRID, shown, "Why ?", "")
    np.testing.assert_allclose(array(figure.axes[0]).ravel(), 16 * shown.weights.mean(axis=0))
    panels = [axes for axes in figure.axes if axes.get_title().startswith("token ")]
    assert len(panels) == views.MAX_PANELS
    for axes, row in zip(panels, shown.weights, strict=False):
        np.testing.assert_allclose(array(axes).ravel(), 16 * row)
    assert (
        "(nothing)" in figure.get_suptitle()
        and "40 visual tokens from 4 x 4" in figure.get_suptitle()
    )


def test_a_mean_is_drawn_as_its_window():
    shown = views.VIEWS["means"].read({}, GRID, 4)
    window = np.zeros((GRID, GRID))
    window[:2, 2:] = 0.25
    np.testing.assert_array_equal(shown.weights[1].reshape(GRID, GRID), window)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    figure = views.draw("pool", picture, GRID, shown, "Why ?", "yes")
    np.testing.assert_array_equal(array(figure.axes[0]), picture)
    segments = [s for lines in figure.axes[0].collections for s in lines.get_segments()]
    assert len(segments) == 2 and (segments[0][:, 0] == 2).all() and (segments[1][:, 1] == 2).all()


def test_every_compressor_has_a_view():
    assert views.VIEWS.keys() == {entry.drawn for entry in COMPRESSORS.values()}


# Mistakes


@pytest.mark.parametrize(
    ("checkpoint", "picture", "out", "message"),
    [
        ("", "parts.jpg", "a.png", "checkpoint is empty; give the workdir of a training run"),
        ("/nowhere", "parts.jpg", "a.png", "config.json' does not exist"),
        ("RUN", "none.jpg", "a.png", "the image file does not exist"),
        ("RUN", "data.json", "a.png", "not an image"),
        ("RUN", "parts.jpg", "a.jpg", "a.jpg must end in .png or .svg"),
        ("RUN", "parts.jpg", "nowhere/a.png", "does not exist; make it first"),
        ("UNSAVED", "parts.jpg", "a.png", "has no finished checkpoint; train first"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(world, tmp_path, capsys, checkpoint, picture, out, message):
    for run in ("RUN", "UNSAVED"):
        (tmp_path / run).mkdir()
        experiment.write(experiment.resolve(tiny.config(world)), tmp_path / run)
    (tmp_path / "RUN" / "checkpoints" / "1").mkdir(parents=True)
    checkpoint = str(tmp_path / checkpoint) if checkpoint in ("RUN", "UNSAVED") else checkpoint
    words = ["--config=configs/eval.py", f"--config.eval.checkpoint={checkpoint}", str(world / picture)]  # fmt: skip
    assert show.main([*words, f"--question={QUESTION}", f"--out={tmp_path / out}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question=Why ?"], "--image is missing"),
        (["a.jpg"], "--question is missing"),
        (["a.jpg", "b.jpg", "--question=Why ?"], "'b.jpg' is not a flag"),
    ],
)
def test_picture_and_question_must_be_given(capsys, words, message):
    assert show.main(["--config=configs/eval.py", *words]) == 2
    assert message in capsys.readouterr().err
