"""What a run was trained on: found out by content, compared when the run goes on."""

import json
import logging
import shutil

import pytest
import tfds_builder
import tiny

from vlm_jax import train
from vlm_jax.data import fingerprint
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.training import inputs


@pytest.fixture
def started(tmp_path):
    """(config, workdir) of a run that has a checkpoint of step 2 and goes on no further than the check."""
    config, workdir = tiny.config(tiny.write(tmp_path / "data")), tmp_path / "run"
    exp = experiment.resolve(config)
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    experiment.write(exp, workdir)
    fingerprint.write(exp.data, workdir)
    return config, workdir


def refused(config, workdir):
    with pytest.raises(ConfigError) as caught:
        train.train(config, str(workdir))
    return str(caught.value)


def goes_on(config, workdir):
    """The checks of a resume pass."""
    exp = experiment.resolve(config)
    inputs.check_same(exp, workdir)
    fingerprint.check(exp.data, workdir)
    return True


def test_a_run_whose_annotations_changed_does_not_go_on(started, tmp_path):
    config, workdir = started
    assert goes_on(config, workdir)
    path = tmp_path / "data" / "data.json"
    text = path.read_text()
    path.write_text(text.replace("red", "ref", 1))  # of the same length
    size = len(text)
    message = refused(config, workdir)
    assert message.startswith(
        f"data: annotations '{path}' changed since the run in '{workdir}' began "
        f"({size:,} bytes then, {size:,} now; sha256 "
    )
    assert message.endswith("restore the file to go on, or give another --workdir to start anew.")
    path.write_text(text)
    assert goes_on(config, workdir)


def test_a_dataset_that_moved_as_a_whole_goes_on(started, tmp_path, caplog):
    config, workdir = started
    shutil.move(tmp_path / "data" / "data.json", tmp_path / "data" / "moved.json")
    shutil.move(tmp_path / "data", tmp_path / "there")
    there = tiny.config(tmp_path / "there")
    there.data.annotations = (str(tmp_path / "there" / "moved.json"),)
    there.data.tokenizer = config.data.tokenizer
    with caplog.at_level(logging.INFO, logger="vlm_jax"):
        assert goes_on(there, workdir)
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}/data/data.json is now read from {tmp_path}/there/moved.json: the same content"
    ]
    there.data.annotations = (*there.data.annotations, there.data.annotations[0])
    there.data.image_roots = (*there.data.image_roots, "")
    there.data.tokenizer = str(tmp_path / "there" / "tokenizer")
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):  # all else is compared by name
        goes_on(there, workdir)
    there.data.tokenizer = config.data.tokenizer
    with pytest.raises(ConfigError, match="began with 1 annotation files, now there are 2"):
        goes_on(there, workdir)


def test_a_run_that_does_not_know_its_annotations_goes_on_and_says_so(started, tmp_path, caplog):
    config, workdir = started
    (workdir / "data.json").unlink()
    with caplog.at_level(logging.INFO, logger="vlm_jax"):
        assert goes_on(config, workdir)
    assert [r.message for r in caplog.records] == [
        f"{workdir} does not say what its run was trained on (an older version made it): "
        "its annotations are taken to be unchanged"
    ]
    config.data.image_roots = (str(tmp_path),)
    with pytest.raises(ConfigError, match=r"data\.image_roots"):  # nothing tells that it moved
        goes_on(config, workdir)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"annotations": [{}]}', '{"annotations": 3}']
)
def test_a_damaged_note_is_named(started, text):
    config, workdir = started
    (workdir / "data.json").write_text(text)
    assert f"'{workdir}/data.json' is damaged" in refused(config, workdir)


def test_a_run_without_a_checkpoint_notes_the_new_annotations(started, tmp_path):
    config, workdir = started
    (workdir / "checkpoints" / "2").rmdir()
    data = tmp_path / "data" / "data.json"
    data.write_text(json.dumps(json.loads(data.read_text())[:4]))
    fingerprint.write(experiment.resolve(config).data, workdir)
    assert goes_on(config, workdir)


def test_a_tfds_directory_is_known_by_its_descriptions_and_sizes(tmp_path):
    def build(name, *answers):
        features = lambda f: {"question": f.Text(), "answer": f.Text()}  # noqa: E731
        rows = [{"question": "Why?", "answer": answer} for answer in answers]
        path = tfds_builder.build(tmp_path / name, features, rows)
        return fingerprint.of(config(str(path)))

    def config(path):
        c = tiny.config(tmp_path)
        c.data.annotations = (path,)
        return experiment.resolve(c).data

    one, longer = build("a", "yes"), build("b", "yes", "no")
    assert one[0]["sha256"] != longer[0]["sha256"]
    shutil.copytree(one[0]["file"], tmp_path / "copy")
    copied = fingerprint.of(config(str(tmp_path / "copy")))
    assert fingerprint.digest(copied) == fingerprint.digest(one) != fingerprint.digest(longer)
