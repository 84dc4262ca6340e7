"""What a dry run counts, against the count of XLA."""

import dataclasses

import jax
import pytest

from configs import paper
from vlm_jax import layers, sharding, sweep
from vlm_jax.aot import programs
from vlm_jax.costs import training as costs
from vlm_jax.costs.training import Ways
from vlm_jax.laws.words import Table
from vlm_jax.storage.run import resolve
from vlm_jax.sweeps import dry_run, plan, stages


def counted(exp, num_layers):
    """XLA's FLOPs of a step with so many layers of the decoder, from the program before it is compiled.

    XLA counts the body of a loop once. So all layers are one turn of theirs, the loss is in one chunk, nothing is computed twice.
    """
    lm = dataclasses.replace(exp.model.lm, num_layers=num_layers, remat="none")
    exp = dataclasses.replace(
        exp, model=dataclasses.replace(exp.model, lm=lm), train=dataclasses.replace(exp.train, loss_chunk=0),
        mesh=dataclasses.replace(exp.mesh, data=1, fsdp=1, tensor=1),
    )  # fmt: skip
    mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
    return programs.train(programs.train_plan(exp, mesh)).cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lm", "visual_tokens", "name"), [("qwen1.5-0.5b", 36, "align"), ("qwen1.5-4b", 576, "tune")]
)
def test_the_flops_of_a_step_are_those_that_xla_counts(tmp_path, monkeypatch, lm, visual_tokens, name):  # fmt: skip
    monkeypatch.setattr(layers, "UNROLLED_LAYERS", 99)
    cfg = paper.get_config()
    (one,) = (t for t in plan.trainings(cfg) if (t.lm, t.visual_tokens) == (lm, (visual_tokens,)))
    (stage,) = (s for s in plan.stages(cfg) if s.name == name)
    exp = resolve(stages.config_of(cfg, stage, one, plan.folders(cfg, tmp_path, 0)))
    with_one, with_two = counted(exp, 1), counted(exp, 2)
    whole = with_one + (exp.model.lm.num_layers - 1) * (with_two - with_one)
    ours = costs.step(exp, Ways(1, 1, 1), exp.data.max_tokens).flops
    assert ours == pytest.approx(whole, rel=0.02)
    assert with_two - with_one > 0.02 * whole / 2  # a layer is enough to be seen


def test_a_compiled_dry_run_has_the_memory_and_the_bound_of_the_program(tmp_path, monkeypatch):
    """The compiler is asked for each width of a row; where it refuses one, the training does not fit."""
    cfg = paper.get_config()
    cfg.sweep.lms, cfg.sweep.visual_tokens = ("qwen1.5-0.5b",), (4,)
    on = dataclasses.replace(dry_run.machine("v5e:2x4", ""), devices=("chip",) * 8)
    asked = []

    def train(exp, mesh):
        asked.append((exp.data.max_tokens, exp.data.length_buckets, mesh))
        if exp.data.max_tokens == 1476:
            return dry_run.roofline.TooBig("train step", "too big")
        return Need(exp.data.max_tokens * 1e6)

    monkeypatch.setattr(dry_run.roofline, "train", train)
    monkeypatch.setattr(dry_run.sharding, "mesh_of", lambda exp, devices: len(devices))
    align, tune = dry_run.entries(cfg, tmp_path, on)
    assert asked == [(132, (), 8), (260, (), 8), (516, (), 8), (1476, (), 8)]
    assert align.peak_bytes == 132e6 and align.hours == pytest.approx(align.steps * 0.5 / 3600)
    assert tune.peak_bytes == float("inf") and tune.remedy and not align.remedy


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dry-run", "--compile"], "--compile: name the chips too"),
        (["--dry-run", "--mfu=0.4"], "--mfu: name the chips too"),
        (["--topology=v5e:2x2", "--workdir=w"], "--topology: is for --dry-run alone"),
        (["--dry-run", "--topology=v5e:2x2", "--mfu=2"], "--mfu: must lie in"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(capsys, flags, words):
    assert sweep.main(["--config=configs/paper.py", *flags]) == 2
    assert words in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Need:
    peak_bytes: float

    def bound(self, chip) -> float:
        return 0.5


def test_a_table_is_written_however_wide_it_is():
    lines = dry_run.as_text(
        Table(["what", "of", "number"], [["x" * 300, "a", "1"], ["y", "b", "22"]])
    )
    assert "x" * 300 in lines[2] and lines[3].split() == ["y", "b", "22"] and len(lines[2]) == len(lines[3])  # fmt: skip
