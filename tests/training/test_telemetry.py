"""What a run tells about itself: FLOPs against the compiler's count, speed, plain lines."""

import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from rich.console import Console

from vlm_jax import progress, sharding, train
from vlm_jax.costs import chips, flops
from vlm_jax.storage import run as experiment
from vlm_jax.training import loop, telemetry


@pytest.mark.parametrize(
    "trainable", [".*", "^(compressor|projector|lm)/", "^(compressor|projector)/"]
)
def test_the_flops_of_a_step_are_a_lower_bound_near_the_compiler_s_count(tmp_path, trainable):
    config = tiny.config(tmp_path)
    size = {"width": 64, "num_heads": 4, "mlp_width": 256}
    config.model.lm.update(size | {"num_kv_heads": 4, "head_dim": 16, "vocab_size": 128})
    config.model.vit.update(size | {"image_px": 64})
    config.model.compressor.stride, config.optim.trainable = 8, trainable
    exp = experiment.resolve(config)
    plan = loop.plan(exp, sharding.make_mesh(exp.mesh), 3)
    ints = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    batch = dict.fromkeys(("tokens", "visual_index", "positions", "segments"), ints)
    batch["loss_mask"] = jax.ShapeDtypeStruct((4, 128), bool)
    batch["images"] = jax.ShapeDtypeStruct((4, 1, 64, 64, 3), jnp.uint8)
    counted = (
        loop.make_step(plan).lower(plan.state, batch).cost_analysis()["flops"]
    )  # element-wise work included
    learning = flatten_dict(plan.state.trainable, sep="/").keys()
    got = flops.batch_flops(exp, learning, tokens=128, has_images=True).total
    assert 0.7 * counted < got < counted


@pytest.mark.parametrize("loss_chunk", [0, 512])
def test_a_step_s_work_counts_logits_as_the_loss_computes_them(tmp_path, loss_chunk):
    config = tiny.config(tmp_path, loss_chunk=loss_chunk)
    exp = experiment.resolve(config)
    plan = loop.plan(exp, sharding.make_mesh(exp.mesh), 3)
    mask = np.zeros((2, 100), bool)  # of two of the batch's rows, those of one of two processes
    mask[0, 90:], mask[1, :3] = True, True  # nothing predicts the first token of a row
    host = {"tokens": np.zeros((2, 100), np.int32), "loss_mask": mask, "images": None}
    assert exp.data.batch_size == 4
    learning = flatten_dict(plan.state.trainable, sep="/").keys()
    want = flops.batch_flops(exp, learning, 100, True, 2 * (10 + 2)).total
    assert loop._work(plan)(host) == (400, want)
    every = flops.batch_flops(exp, learning, 100, True).total
    assert (want < every) == (loss_chunk > 0)


def test_the_peak_is_known_for_accelerators_only():
    assert chips.peak_flops("NVIDIA H200") == 989e12
    assert chips.peak_flops("TPU v5 lite") == 197e12 and chips.peak_flops("TPU v5") == 459e12
    assert chips.peak_flops("cpu") is None


def test_speed_counts_the_steps_since_the_last_call(monkeypatch):
    now = iter((10.0, 12.0, 13.0))
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(now))
    display = telemetry.Display(total=100, done=4, shows=False)
    for step, tokens in zip(range(5, 10), (80, 40, 40, 40, 7), strict=True):  # of several shapes
        display.add(step, tokens, tokens * 6e10)
    speed = display.speed(8, peak=24e12)
    assert speed == pytest.approx({"steps_per_second": 2, "tokens_per_second": 100, "mfu": 0.25})
    assert display.speed(9, None) == pytest.approx({"steps_per_second": 1, "tokens_per_second": 7})


def test_without_a_terminal_a_report_is_one_plain_line(caplog):
    display = telemetry.Display(total=100, done=0, shows=True)
    line = {"step": 40, "loss": 1.23456, "bad_records": 2, "skipped": 1}
    with caplog.at_level(logging.INFO, logger="vlm_jax"):
        display.report(line, {"steps_per_second": 0.5, "tokens_per_second": 12345.6, "mfu": 0.421})
    assert caplog.messages == [
        "step 40/100  loss 1.2346  12,346 tokens/s  MFU 42.1%  2 bad records  1 steps left out  0:02:00 left"
    ]


@pytest.mark.slow
def test_a_report_that_has_no_new_step_to_tell_of_is_left_out(tmp_path, caplog):
    """With log_every = 1 or 2 the second step is sent before a second one is computed: a speed of 0 would be told."""
    config = tiny.config(tiny.write(tmp_path / "data"), num_steps=4, log_every=1, save_every=4)
    with caplog.at_level(logging.INFO, logger="vlm_jax"):
        train.train(config, str(tmp_path / "run"))
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]
    assert re.fullmatch(r"step 1/4  loss \d\.\d{4}  first step after 0:\d\d:\d\d", lines[0])
    for line in lines[1:]:
        assert re.search(r"  [1-9][\d,]* tokens/s", line) and line.endswith("0:00:00 left")


def test_a_bar_leaves_compiling_behind_with_the_first_step(monkeypatch, capsys):
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=sys.stdout, width=120, force_terminal=True)
    )
    display = telemetry.Display(total=100, done=0, shows=True)
    display.add(1, 10, 1.0)
    display.first({"step": 1, "loss": 2.5})
    assert display.speed(1, None) == {}
    display.close()
    shown = [line for line in capsys.readouterr().out.splitlines() if "/100" in line]
    assert "0/100" in shown[0] and "compiling" in shown[0]
    assert "1/100" in shown[-1] and "loss 2.5000" in shown[-1] and "compiling" not in shown[-1]
