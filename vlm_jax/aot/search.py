"""A guided search for the mesh, remat policy and micro-batches that fit and have the lowest roofline bound."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from vlm_jax import sharding
from vlm_jax.aot import programs, roofline
from vlm_jax.aot.footprint import misfit
from vlm_jax.aot.roofline import Need
from vlm_jax.costs.chips import GIB
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment, MeshConfig

TRIALS = 12  # compilations; a 7B decoder takes about a minute each
NOTHING = "nothing fits: take more or larger chips, a smaller batch or shorter samples."

REMAT_BY_MEMORY = ("none", "dots", "full")  # the lightest recomputation first


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting and its result. seconds is infinite if it does not fit; peak_bytes too, if compiling was needed to know."""

    experiment: Experiment
    seconds: float
    peak_bytes: float
    text: str

    @property
    def fits(self) -> bool:
        return math.isfinite(self.seconds)

    @property
    def rank(self) -> tuple[float, float]:
        return (self.seconds, self.peak_bytes)


class Search:
    """Trials so far, each printed on a line; none is made twice."""

    def __init__(self, exp: Experiment, devices: list[Any], say: Callable[[str], Any], limit: int):
        chip = roofline.chip_of(devices)
        if chip is None:
            raise ConfigError(
                f"--search: {devices[0].device_kind!r} has no known memory and speed; give a --topology of TPUs."
            )
        self.exp, self.devices, self.chip, self.say, self.left = exp, devices, chip, say, limit
        self.trials: dict[str, Trial] = {}

    @property
    def best(self) -> Trial | None:
        fitting = [trial for trial in self.trials.values() if trial.fits]
        return min(fitting, key=lambda trial: trial.rank, default=None)

    def try_(self, mesh: MeshConfig, remat: str, micro_batches: int) -> Trial | None:
        """Compiles a setting, or returns its earlier result; None when no trials are left."""
        exp = changed(self.exp, mesh, remat, micro_batches)
        name = flags(exp)
        if name in self.trials:
            return self.trials[name]
        if not self.left:
            return None
        before, start = self.left, time.monotonic()
        trial = self._run(exp)
        self.trials[name] = trial
        seconds = time.monotonic() - start
        left = (
            f", {self.left} more at most: {self.left * seconds / 60:.0f} min" if self.left else ""
        )
        told = (
            f"  ({seconds:.0f} s{left})" if self.left < before else ""
        )  # otherwise nothing was compiled
        self.say(f"{name}  {trial.text}{told}\n")
        return trial

    def _run(self, exp: Experiment) -> Trial:
        mesh = sharding.mesh_of(exp, self.devices)
        state = state_bytes(programs.train_plan(exp, mesh).state)
        if state > self.chip.hbm_bytes:
            text = f"does not fit: the state alone is {state / GIB:.2f} GiB"
            return Trial(exp, math.inf, state, text)
        self.left -= 1
        need = roofline.train(exp, mesh)
        if reason := misfit(need, self.chip):
            return Trial(exp, math.inf, math.inf, reason)
        assert isinstance(need, Need)  # else it would not fit
        seconds, peak = need.bound(self.chip), need.peak_bytes
        text = (
            f"{peak / GIB:.2f} GiB, at least {seconds * 1e3:.4g} ms ({need.bounded_by(self.chip)}), "
            f"MFU at most {need.mfu(self.chip):.1%}"
        )
        return Trial(exp, seconds, peak, text)


def search(
    exp: Experiment, devices: list[Any], say: Callable[[str], Any], limit: int = TRIALS
) -> Experiment | None:
    """The fastest setting that fits, of equally fast ones the one with the lower peak memory; None when no trial fits.

    1. On the meshes that hold the least per chip: full recomputation, with more micro-batches until it fits.
    2. On that mesh: lighter recomputation as long as it fits.
    3. The other meshes, with the best setting so far.
    4. On the best mesh: lighter recomputation again.
    At most `limit` compilations; each is reported as a line of command-line flags.
    """
    run = Search(exp, devices, say, limit)
    meshes = [
        mesh
        for mesh in candidates(exp, len(devices) // exp.mesh.slices)
        if _divides(exp, mesh, devices)
    ]
    say(
        f"search: {len(meshes)} meshes divide the model and the batch; at most {limit} compilations of the training step, "
        "then the table's; each takes one to a few minutes for a 7B decoder on two cores\n"
    )
    for mesh in [mesh for mesh in meshes if mesh.data == meshes[0].data]:
        for micro in _micro_batches(exp, mesh):
            trial = run.try_(mesh, REMAT_BY_MEMORY[-1], micro)
            if trial is None or math.isfinite(trial.peak_bytes):
                break  # it fits, or no number of micro-batches makes the state smaller
        if run.best:
            break
    if run.best is None:
        return None
    _lighten(run)
    for mesh in meshes:
        best = run.best.experiment
        run.try_(mesh, best.model.lm.remat, best.train.micro_batches)
    _lighten(run)
    say(f"best of {len(run.trials)}: {flags(run.best.experiment)}\n\n")
    return run.best.experiment


def _lighten(run: Search) -> None:
    """Tries lighter recomputation on the best mesh so far, until it no longer fits."""
    assert run.best is not None
    best = run.best.experiment
    for remat in reversed(REMAT_BY_MEMORY[:-1]):
        trial = run.try_(best.mesh, remat, best.train.micro_batches)
        if trial is None or not trial.fits:
            return


def candidates(exp: Experiment, num_devices: int) -> Iterator[MeshConfig]:
    """Meshes of a slice of `num_devices` devices over which the batch splits evenly.

    They are ordered by tensor size (tensor parallelism communicates twice per layer), then by copies of the weights.
    """
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for tensor, data in itertools.product(divisors, divisors):
        if (
            num_devices % (tensor * data) == 0
            and exp.data.batch_size % (num_devices // tensor * exp.mesh.slices) == 0
        ):
            yield dataclasses.replace(
                exp.mesh, data=data, fsdp=num_devices // tensor // data, tensor=tensor
            )


def _divides(exp: Experiment, mesh: MeshConfig, devices: list[Any]) -> bool:
    """Whether every parameter and the batch split evenly over the mesh."""
    try:
        changed = dataclasses.replace(exp, mesh=mesh)
        programs.train_plan(changed, sharding.mesh_of(changed, devices))
    except ConfigError:
        return False
    return True


def _micro_batches(exp: Experiment, mesh: MeshConfig) -> list[int]:
    """Of 1, 2, 4 and 8, those that divide the rows of a device."""
    rows = exp.data.batch_size // (mesh.data * mesh.fsdp * mesh.slices)
    return [n for n in (1, 2, 4, 8) if rows % n == 0]


def changed(exp: Experiment, mesh: MeshConfig, remat: str, micro_batches: int) -> Experiment:
    lm = dataclasses.replace(exp.model.lm, remat=remat)
    return dataclasses.replace(
        exp,
        model=dataclasses.replace(exp.model, lm=lm),
        mesh=mesh,
        train=dataclasses.replace(exp.train, micro_batches=micro_batches),
    )


def flags(exp: Experiment) -> str:
    """The command-line flags for this mesh, remat policy and number of micro-batches."""
    m = exp.mesh
    slices = f"--config.mesh.slices={m.slices} " if m.slices > 1 else ""
    return (
        f"{slices}--config.mesh.data={m.data} --config.mesh.fsdp={m.fsdp} --config.mesh.tensor={m.tensor} "
        f"--config.model.lm.remat={exp.model.lm.remat} --config.train.micro_batches={exp.train.micro_batches}"
    )


def state_bytes(state: Any) -> float:
    """The bytes of parameters and optimiser state per chip."""
    leaves = jax.tree.leaves(state)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
