"""What a run says before it begins and when it is done; a frozen part without weights."""

import dataclasses
import types

import pytest
import tiny

from vlm_jax import train
from vlm_jax.settings import presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import InitConfig
from vlm_jax.storage import run as experiment
from vlm_jax.training import outline


def tree(**parts):
    """Parts of given numbers of parameters, as a model's tree of shapes."""
    return {
        name: {"dense": {"kernel": types.SimpleNamespace(shape=(2, count // 2))}}
        for name, count in parts.items()
    }


@pytest.fixture
def exp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return experiment.resolve(tiny.config(tiny.write(tmp_path / "data"), random_frozen=False))


LEARNING, STILL = tree(compressor=1234, projector=40), tree(vit=86_000_000, lm=1_500_000_000)


def started(exp, trainable=LEARNING, frozen=STILL, done=0):
    return outline.start(
        exp, trainable, frozen, visual_tokens=1, num_records=10, num_steps=5, done=done, devices="2 x TPU v5e"
    )  # fmt: skip


def test_a_run_says_what_it_starts_from_in_five_lines(exp, tmp_path):
    exp = dataclasses.replace(exp, init=InitConfig(str(tmp_path / "clip"), "", "", "", "run"))
    assert outline.opening(1, tmp_path / "runs" / "a", None) == (
        "runs/a: a new run; loading jax and opening 1 annotation file ..."
    )
    assert started(exp) == [
        "  data     10 records of data/data.json; images in data",
        "  model    images of 16 px = 4 patches -> tokenpacker: V = 1 visual tokens -> decoder of 2 layers, width 16; "
        "T = 32 tokens per row; template vicuna_v1, tokenizer data/tokenizer",
        "  trained  compressor 1.23k (from run), projector 40 (from run)",
        "  frozen   vit 86M (from clip), lm 1.5B (from run)",
        "  steps    5 of 4 records = 2 epochs on 2 x TPU v5e; adamw, rate 0.01; compiling the first step ...",
    ]
    assert "compressor 1.23k (from step 3 of this run)" in started(exp, done=3)[2]


def test_random_parts_stand_in_capitals(exp):
    frozen = {"vit": STILL["vit"], "lm": tree(lm=1000)["lm"]}
    lines = started(exp, LEARNING | tree(lm=24), frozen)
    assert (
        lines[2]
        == "  trained  compressor 1.23k (RANDOM), projector 40 (RANDOM), lm 24 of 1.02k (RANDOM)"
    )
    assert lines[3] == "  frozen   vit 86M (RANDOM)"


def test_a_frozen_random_part_is_an_error_that_names_the_ways_out(exp):
    with pytest.raises(ConfigError) as caught:
        outline.check_frozen(exp, LEARNING, STILL)
    assert str(caught.value) == (
        "train: vit (86M parameters) and lm (1.5B parameters) would be FROZEN and RANDOM: nothing names where they come "
        "from, and optim.trainable '^(compressor|projector|lm)/' does not train them. Give --config.init.vit=DIR "
        "--config.init.lm=DIR (a model directory, whose path is also the preset, or a run), or --config.init.from=RUN for "
        "all parts; if it is meant, --config.train.random_frozen=True."
    )


def test_what_is_asked_for_unused_or_an_adapter_may_be_frozen_and_random(exp):
    allowed = dataclasses.replace(exp, train=dataclasses.replace(exp.train, random_frozen=True))
    outline.check_frozen(allowed, LEARNING, STILL)
    given = dataclasses.replace(exp, init=InitConfig("v", "", "", "l"))
    outline.check_frozen(given, LEARNING, STILL)
    text_only = dataclasses.replace(exp, data=dataclasses.replace(exp.data, max_images=0))
    outline.check_frozen(text_only, tree(lm=10), tree(vit=10, compressor=10, projector=10))
    leaf = types.SimpleNamespace(shape=(2, 2))
    outline.check_frozen(exp, LEARNING, {"lm": {"q": {"lora_a": leaf, "lora_b": leaf}}})
    with pytest.raises(ConfigError, match=r"^train: lm \(8 parameters\) would be"):
        outline.check_frozen(exp, LEARNING, {"lm": {"q": {"lora_a": leaf}, "embed": leaf}})


def test_the_end_names_what_was_written_and_the_next_command(exp, tmp_path):
    lines = outline.end(exp, tmp_path / "runs" / "a", {"step": 6, "loss": 0.12345})
    assert lines[0] == "runs/a is finished: step 6, loss 0.1235"
    assert lines[1].startswith("  wrote    runs/a/checkpoints/6, ")
    assert (
        "vlm_jax.evaluate --config=configs/eval.py --workdir=DIR --config.eval.checkpoint=runs/a"
        in lines[2]
    )
    adapters = dataclasses.replace(exp.optim, trainable="lora_|^(compressor|projector)/")
    tuned = dataclasses.replace(exp, optim=adapters)
    assert "vlm_jax.evaluate" in outline.end(tuned, tmp_path / "a", {"step": 6, "loss": 1.0})[2]
    aligned = dataclasses.replace(exp.optim, trainable="^(compressor|projector)/")
    following = outline.end(
        dataclasses.replace(exp, optim=aligned), tmp_path / "a", {"step": 6, "loss": 1.0}
    )[2]
    assert (
        "vlm_jax.train --config=configs/stage2.py --workdir=DIR --config.init.from=a" in following
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (82_170, "82.2k"), (999_499, "999k"), (999_500, "1M"), (7.06e9, "7.06B")],
)  # fmt: skip
def test_parameters_are_told_in_three_figures(count, text):
    assert presets.size_name(count) == text


def test_a_training_says_its_lines_and_refuses_a_frozen_random_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, lines = tiny.config(tiny.write(tmp_path / "data"), random_frozen=False), []
    with pytest.raises(
        ConfigError, match=r"^train: vit \(2.79k parameters\) would be FROZEN and RANDOM"
    ):
        train.train(config, "runs/a", say=lines.append)
    assert lines == ["runs/a: a new run; loading jax and opening 1 annotation file ..."]
    assert not (
        tmp_path / "runs" / "a" / "config.json"
    ).exists()  # the workdir is free for the mended command
    config.train.random_frozen, config.train.num_steps = True, 1
    metrics = train.train(config, "runs/a", say=lines.append)
    assert [line.split()[0] for line in lines[2:]] == [
        "data", "model", "trained", "frozen", "steps", "runs/a", "wrote", "next",
    ]  # fmt: skip
    assert "vit 2.79k (RANDOM)" in lines[5]
    assert lines[7] == f"runs/a is finished: step 1, loss {metrics['loss']:.4f}"
    assert train.train(config, "runs/a", say=lines.append) == metrics
    assert lines[10:] == lines[7:10]  # a finished run says it again
