"""The held-out loss: the training loss on records that are not trained on, every so many steps, and the best parameters so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import sharding
from vlm_jax.data import pipeline, sources
from vlm_jax.files import Path
from vlm_jax.models.attention import flash_kernel
from vlm_jax.settings.run import DataConfig, Experiment
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import save_params
from vlm_jax.training import optim
from vlm_jax.training.losses import make_loss
from vlm_jax.training.step import TrainPlan, TrainState, attention_kernel
from vlm_jax.training.telemetry import read_lines

LOSS = "validation_loss"  # its name in the metrics
BEST = "best"  # folder of a workdir with the parameters of the lowest held-out loss, a run to start from


def held_out(exp: Experiment) -> DataConfig:
    """The data settings of a run with the records of train.validation in place of the training records."""
    files = exp.train.validation
    roots = exp.train.validation_roots or exp.data.image_roots[:1] * len(files)
    return dataclasses.replace(
        exp.data, annotations=files, image_roots=roots, sampling="shuffle", length_buckets=(), on_bad_record="raise"
    )  # fmt: skip


class Validation:
    """Measures the held-out loss of a state. Every batch and the order of batches are the same each time."""

    def __init__(self, p: TrainPlan, visual_tokens: int, workdir: Path):
        exp = p.experiment
        self._plan, self._data = p, held_out(exp)
        self._visual_tokens, self._folder = visual_tokens, workdir / BEST
        # Records that do not fill a last batch are left out; fewer than a batch are read more than once.
        self._batches = max(len(sources.open_source(self._data)) // exp.data.batch_size, 1)
        kernel = attention_kernel(exp, flash_kernel(p.mesh.devices.flat[0]))
        self._loss = jax.jit(make_loss(exp, kernel))
        lines = [line for line in read_lines(workdir / "metrics.jsonl") if LOSS in line]
        self.best = min((line[LOSS] for line in lines), default=float("inf"))

    def is_due(self, step: int) -> bool:
        """Every train.validate_every steps, and after the last one."""
        return (
            step % self._plan.experiment.train.validate_every == 0 or step == self._plan.num_steps
        )

    def loss(self, state: TrainState) -> float:
        """Mean over all supervised tokens of the held-out records. Every process must call it."""
        exp, mesh = self._plan.experiment, self._plan.mesh
        shard = sharding.data_shard(mesh)
        iterator = pipeline.train_iterator(self._data, self._visual_tokens, exp.model.vit, *shard)
        total = count = 0.0
        try:
            for number in range(self._batches):
                batch = sharding.put(next(iterator), mesh)
                # The number of the batch draws an elastic compressor's visual tokens.
                loss, scalars = self._loss(state.trainable, batch, jnp.int32(number), state.frozen)
                total += float(loss) * float(scalars["tokens"])
                count += float(scalars["tokens"])
        finally:
            iterator.close()
        return total / max(count, 1.0)

    def keep(self, step: int, state: TrainState, loss: float) -> None:
        """Notes a loss, and with train.keep_best saves the parameters that have the lowest so far."""
        if loss >= self.best:
            return
        self.best = loss
        exp = self._plan.experiment
        if not exp.train.keep_best:
            return
        params: dict[str, Any] = optim.merge(state.trainable, state.frozen)
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            experiment.write(exp, self._folder)
        save_params(self._folder, params, step)
