"""What a training step takes by count, against what XLA's compiler reported and against sums by hand."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from configs import stage1, stage2
from vlm_jax.costs import training
from vlm_jax.costs.chips import CHIPS, GIB
from vlm_jax.costs.training import Ways
from vlm_jax.storage.run import resolve

TABLE = Path(__file__).resolve().parents[2] / "docs" / "scale_aot.csv"
COMPILED = [row for row in csv.DictReader(TABLE.open()) if row["kind"] in ("fit", "weak")]


def experiment(command: str):
    """The experiment that a command line of docs/scale_aot.csv describes."""
    cfg = stage2.get_config()
    for field, text in re.findall(r"--config\.(\S+?)=(\S+)", command):
        node = cfg
        *blocks, last = field.split(".")
        for name in blocks:
            node = node[name]
        value = () if text == "()" else int(text) if text.lstrip("-").isdigit() else text
        node[last] = value
    return resolve(cfg)


@pytest.mark.parametrize("line", COMPILED, ids=lambda r: f"{r['lm']}-{r['visual_tokens']}-{r['topology']}")  # fmt: skip
def test_memory_flops_and_links_are_near_those_of_the_compiler(line):
    exp, chips = experiment(line["command"]), int(line["chips"])
    mesh = exp.mesh
    ways = Ways(mesh.data, mesh.fsdp, 1)
    assert ways.chips == chips
    step = training.step(exp, ways, exp.data.max_tokens)
    peak = float(line["peak_gib"])
    assert step.peak_bytes / GIB == pytest.approx(peak, rel=0.3)
    assert step.hardware_flops / chips / 1e9 == pytest.approx(float(line["gflop_per_chip"]), rel=0.08)  # fmt: skip
    if float(line["sent_gib"]) > 8:  # small LMs send little, and the compiler splits it as it likes
        assert step.sent_bytes / GIB == pytest.approx(float(line["sent_gib"]), rel=0.45)


def test_a_frozen_decoder_needs_no_gradients_and_no_moments():
    learnt, frozen = (resolve(m.get_config()) for m in (stage2, stage1))
    frozen = dataclasses.replace(frozen, data=learnt.data)
    ways, params = Ways(1, 8, 1), learnt.model.lm.total_params
    both = [training.step(exp, ways, 512) for exp in (learnt, frozen)]
    assert both[0].peak_bytes - both[1].peak_bytes > 12 * params / 8
    assert "lm/embed" in training.trainable(learnt)
    assert set(training.trainable(frozen)) == {
        "compressor/weights", "projector/dense_0/kernel", "projector/dense_1/kernel",
    }  # fmt: skip


def test_all_parameters_of_the_decoder_are_counted_once():
    exp = resolve(stage2.get_config())
    counted = sum(n for path, n in training.parameters(exp.model).items() if path.startswith("lm/"))
    assert counted == exp.model.lm.total_params


def test_micro_batches_and_recomputation_cost_no_memory_but_time():
    exp, ways, chip = resolve(stage2.get_config()), Ways(1, 8, 1), CHIPS[1]
    step = training.step(exp, ways, 2048)
    lm = dataclasses.replace(exp.model.lm, remat="full")
    light = dataclasses.replace(exp, model=dataclasses.replace(exp.model, lm=lm))
    light = dataclasses.replace(light, train=dataclasses.replace(exp.train, micro_batches=4))
    less = training.step(light, ways, 2048)
    assert less.peak_bytes < step.peak_bytes / 2
    assert less.seconds(chip) > step.seconds(chip) and less.flops == step.flops
