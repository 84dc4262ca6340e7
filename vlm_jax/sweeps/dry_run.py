"""What a sweep takes before it is begun: steps, tokens, FLOPs, memory per chip, time, chip-hours and dollars of every training.

Counted from the shapes of the models (vlm_jax/costs); data and weights need not be there. With `compiled` the memory and the
bound of the time are those of XLA's compiler (vlm_jax/aot). Evaluations, prepare steps and cached features are not counted:
about a hundredth of a sweep of LMs of billions of parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from vlm_jax import aot, sharding
from vlm_jax.aot import programs, roofline
from vlm_jax.costs import training as costs
from vlm_jax.costs.chips import CHIPS, GIB, Chip
from vlm_jax.costs.training import Ways
from vlm_jax.data import sources
from vlm_jax.files import Path, to_path
from vlm_jax.laws.words import Table
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment
from vlm_jax.storage import run as experiment
from vlm_jax.sweeps import checks, plan, stages
from vlm_jax.sweeps.plan import Stage, Training

log = logging.getLogger(__name__)

TOPOLOGY = re.compile(r"(\w+):(\d+(?:x\d+)*)$")
WIDEST = 1000  # characters of a line
MICRO_BATCHES = (1, 2, 4, 8, 16)
PARTS = (0, 2, 4, 8)  # of mesh.tensor that are tried; 0: as the config says


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind. mfu: the share of their peak that trainings are taken to reach; None: the bound."""

    chip: Chip
    count: int
    mfu: float | None
    devices: tuple[Any, ...] = ()  # that the steps are compiled for; none: they are counted

    @property
    def name(self) -> str:
        return f"{self.count} x {self.chip.name} ({self.chip.hbm_bytes / GIB:.3g} GiB each)"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One training of a stage. What depends on a machine is None where none is given."""

    stage: str
    who: str  # which seed, LM or cell
    steps: int
    tokens: float  # of all steps
    flops: float
    peak_bytes: float | None
    hours: float | None
    remedy: str  # the settings with which it fits; "" where it fits as it is
    finished: bool


def machine(topology: str, mfu: str, compiled: bool = False) -> Machine | None:
    """From "v5e:16x16" or "H100:8"; None for "". Raises ConfigError for another one.

    compiled: of a TPU topology, the devices too.
    """
    if not topology:
        return None
    match = TOPOLOGY.match(topology)
    chip = next((chip for chip in CHIPS if match and chip.name == match[1]), None)
    if match is None or chip is None:
        raise ConfigError(
            f"--topology: {topology!r} is not known; give one of {', '.join(c.name for c in CHIPS)} and how many, such as "
            "v5e:16x16 or H100:8."
        )
    share = number("--mfu", mfu)
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--mfu: must lie in (0, 1], got {mfu}.")
    devices = ()
    if compiled:
        aot.quiet_environment(topology)
        devices = tuple(programs.devices(topology))
    return Machine(chip, math.prod(map(int, match[2].split("x"))), share, devices)


def number(flag: str, text: str) -> float | None:
    """None for ""."""
    try:
        return float(text) if text else None
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a number.") from None


def entries(cfg: ConfigDict, root: Path, on: Machine | None) -> list[Entry]:
    """Every training, each once, in the order of the plan. Raises ConfigError with all mistakes of the config."""
    found: dict[Path, Entry] = {}
    for one in checks.check(cfg, root, with_inputs=False):
        where = plan.folders(cfg, root, one.seed)
        for stage in plan.all_stages(cfg, one):
            folder = where.stage(stage, one)
            if folder not in found:
                exp = experiment.resolve(stages.config_of(cfg, stage, one, where))
                found[folder] = _entry(stage, _who(stage, one), exp, on, folder)
    return list(found.values())


def _who(stage: Stage, one: Training) -> str:
    names = {"seed": f"seed {one.seed}", "lm": plan.label(one.lm), "cell": one.name}
    return names[stage.per]


def _entry(stage: Stage, who: str, exp: Experiment, on: Machine | None, folder: Path) -> Entry:
    steps = stage.steps or _steps_of_epochs(stage, exp)
    widths = _widths(stage, exp)
    ways = Ways(1, 1, 1)
    if on is not None:
        ways = ways_of(exp, on.count)
    each = [(share, costs.step(exp, ways, width, exp.data.max_images > 0)) for width, share in widths]  # fmt: skip
    hours = peak = None
    remedy = ""
    if on is not None:
        needs = [(step.peak_bytes, step.seconds(on.chip)) for _, step in each]
        if on.devices:
            log.info("compiling %s of %s ...", stage.name, who)
            needs = [_compiled(exp, on, width) for width, _ in widths]
        pace = 1 / (on.count * on.chip.peak_flops * on.mfu) if on.mfu else 0.0  # seconds per FLOP
        seconds = [max(bound, step.flops * pace) for (_, bound), (_, step) in zip(needs, each, strict=True)]  # fmt: skip
        hours = steps * sum(share * s for (share, _), s in zip(each, seconds, strict=True)) / 3600
        peak = max(need for need, _ in needs)
        if peak > on.chip.hbm_bytes:
            remedy = cure(exp, on, max(width for width, _ in widths))
    return Entry(
        stage.name, who, steps,
        tokens=steps * sum(share * step.tokens for share, step in each),
        flops=steps * sum(share * step.flops for share, step in each),
        peak_bytes=peak, hours=hours, remedy=remedy,
        finished=experiment.finished(folder) is not None,
    )  # fmt: skip


def _steps_of_epochs(stage: Stage, exp: Experiment) -> int:
    records = stage.records
    if not records:
        missing = [path for path in exp.data.annotations if not to_path(path).exists()]
        if missing:
            raise ConfigError(
                f"sweep.stages.{stage.name}: counts epochs, but records is 0 and {missing[0]!r} is not there to be counted; "
                "set records."
            )
        records = len(sources.open_source(exp.data))
    return max(int(stage.epochs * math.ceil(records / stage.batch_size)), 1)


def _widths(stage: Stage, exp: Experiment) -> list[tuple[int, float]]:
    """(slots of a row, share of the steps)."""
    longest = exp.data.max_tokens
    if not stage.buckets:
        return [(longest, 1.0)]
    visual = longest - stage.text_tokens
    total = sum(share for _, share in stage.buckets)
    return [(width + visual, share / total) for width, share in stage.buckets]


def _compiled(exp: Experiment, on: Machine, width: int) -> tuple[float, float]:
    """Peak bytes per chip and the bound of a step on rows of `width` slots; both infinite where the compiler refuses it."""
    data = dataclasses.replace(exp.data, max_tokens=width, sampling="shuffle", length_buckets=())
    exp = dataclasses.replace(exp, data=data)
    need = roofline.train(exp, sharding.mesh_of(exp, list(on.devices)))
    if isinstance(need, roofline.TooBig):
        return math.inf, math.inf
    return need.peak_bytes, need.bound(on.chip)


def ways_of(exp: Experiment, chips: int) -> Ways:
    """The mesh that a training would get. Raises ConfigError when its sizes do not make the chips, or cut its batch."""
    micro = exp.train.micro_batches
    sizes = sharding.mesh_sizes(exp.mesh, chips, exp.data.batch_size // micro)
    copies, shards, *parts = sizes
    if exp.data.batch_size % (copies * shards * micro):
        raise ConfigError(
            f"data: batch_size {exp.data.batch_size} is not divisible by mesh data*fsdp = {copies * shards} x "
            f"micro_batches {micro}."
        )
    return Ways(copies, shards, math.prod(parts))


def cure(exp: Experiment, on: Machine, width: int) -> str:
    """The fields, as lm_settings takes them, with which a step fits the chips; of several the fastest ones."""
    best: tuple[float, str] | None = None
    for changed, fields in _changes(exp):
        try:
            step = costs.step(changed, ways_of(changed, on.count), width, exp.data.max_images > 0)
        except ConfigError:
            continue
        if step.peak_bytes <= on.chip.hbm_bytes:
            found = (step.seconds(on.chip), ", ".join(f"{k}={v}" for k, v in fields.items()))
            best = min(best or found, found)
    return f"fits with {best[1]}" if best else "fits with no setting; use more chips"


def _changes(exp: Experiment) -> Iterator[tuple[Experiment, dict[str, object]]]:
    lm, mesh = exp.model.lm, exp.mesh
    for parts, micro, remat, chunk in itertools.product(
        PARTS, MICRO_BATCHES, dict.fromkeys((lm.remat, "full")), dict.fromkeys((exp.train.loss_chunk, 512))
    ):  # fmt: skip
        fields: dict[str, object] = {}
        changed_mesh = mesh
        if parts:
            changed_mesh = dataclasses.replace(mesh, data=1, fsdp=-1, tensor=parts)
            fields |= {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": parts}
        wanted = {"train.micro_batches": (micro, exp.train.micro_batches), "model.lm.remat": (remat, lm.remat), "train.loss_chunk": (chunk, exp.train.loss_chunk)}  # fmt: skip
        fields |= {name: value for name, (value, now) in wanted.items() if value != now}
        yield (
            dataclasses.replace(
                exp,
                model=dataclasses.replace(exp.model, lm=dataclasses.replace(lm, remat=remat)),
                mesh=changed_mesh,
                train=dataclasses.replace(exp.train, micro_batches=micro, loss_chunk=chunk),
            ),
            fields,
        )


# --- what is printed --------------------------------------------------------------------------------------------------


def report(
    cfg: ConfigDict, workdir: str, on: Machine | None, chip_hour_dollars: float | None
) -> str:
    """The table of all trainings, their total, and what it assumes."""
    root = to_path(workdir).absolute() if workdir else to_path("sweep")
    found = entries(cfg, root, on)
    lines = as_text(_table(found, on, chip_hour_dollars))
    lines += ["", *_totals(found, on, chip_hour_dollars)]
    if saving := _saving(cfg, root, on, found):
        lines.append(saving)
    misfits = [e for e in found if e.remedy]
    for entry in misfits:
        lines.append(f"does not fit: {entry.stage} of {entry.who}: {entry.remedy}")
    if on is not None and not misfits:
        lines.append("every training fits.")
    return "\n".join(lines) + "\n"


def as_text(table: Table) -> list[str]:
    """The lines of a table with two columns of words, however wide it is."""
    console = Console(file=io.StringIO(), width=WIDEST)
    with console.capture() as written:
        console.print(table.on_terminal(left=2))
    return [line.rstrip() for line in written.get().splitlines() if line.strip()]


def _table(found: Sequence[Entry], on: Machine | None, dollars: float | None) -> Table:
    head = ["stage", "of", "steps", "tokens", "FLOPs"]
    if on is not None:
        head += ["GiB/chip", "hours", "chip-hours", *(["$"] if dollars is not None else [])]
    body = []
    for e in found:
        cells = [e.stage, e.who, f"{e.steps:,}", f"{e.tokens:.3g}", f"{e.flops:.3g}"]
        if on is not None and e.hours is not None and e.peak_bytes is not None:
            chip_hours = e.hours * on.count
            cells += [f"{e.peak_bytes / GIB:.1f}{'!' if e.remedy else ''}", f"{e.hours:.2f}", f"{chip_hours:,.0f}"]  # fmt: skip
            cells += [f"{chip_hours * dollars:,.0f}"] if dollars is not None else []
        body.append([*cells, "finished" if e.finished else ""])
    return Table([*head, ""], body)


def _totals(found: Sequence[Entry], on: Machine | None, dollars: float | None) -> list[str]:
    lines = []
    for name, chosen in (("all", found), ("left", [e for e in found if not e.finished])):
        text = f"{name}: {len(chosen)} trainings, {sum(e.flops for e in chosen):.3g} FLOPs"
        if on is not None:
            hours = sum(e.hours or 0.0 for e in chosen)
            text += f", {hours:,.1f} hours, {hours * on.count:,.0f} chip-hours"
            if dollars is not None:
                text += f", ${hours * on.count * dollars:,.0f}"
        lines.append(text)
    if on is not None:
        at = "its bound: no run is faster" if on.mfu is None else f"{on.mfu:.0%} of the peak, or its bound if that is longer"  # fmt: skip
        lines.append(f"{on.name}; the time of a step is {at}. Trainings run one after the other.")
    return lines


def _saving(cfg: ConfigDict, root: Path, on: Machine | None, found: Sequence[Entry]) -> str:
    """What one training per LM saves; "" where no compressor is elastic."""
    if not any(len(one.visual_tokens) > 1 for one in plan.trainings(cfg)):
        return ""
    apart = copy.deepcopy(cfg)
    apart.sweep.elastic = False
    others = entries(apart, root, on)
    flops = [sum(e.flops for e in group) for group in (found, others)]
    text = f"elastic: {len(found)} trainings instead of {len(others)}, {flops[0]:.3g} instead of {flops[1]:.3g} FLOPs"
    if on is not None:
        hours = [sum(e.hours or 0.0 for e in group) * on.count for group in (found, others)]
        text += f", {hours[0]:,.0f} instead of {hours[1]:,.0f} chip-hours"
    return text
