"""What a sweep consists of, read from its config: cells, the trainings that serve them, stages, and where each is kept."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import benchmarks, compressors
from vlm_jax.files import Path, to_path
from vlm_jax.settings.addresses import scheme
from vlm_jax.settings.checks import ConfigError, build, check_choice, check_positive

PER = ("seed", "lm", "cell")  # what a stage is trained once for
CELLS = ("all", "blind", "query_aware")  # which cells' compressors a stage is for
# Baselines that stand where a compressor's name does.
RESIZED = "resized"  # not compressed: the image is shrunk before the encoder
TEXT_ONLY = (
    "text_only"  # without the image: the error of guessing from the question; of 0 visual tokens
)
BASELINES = (RESIZED, TEXT_ONLY)
PARTS = ("vit", "compressor", "projector", "lm")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep."""

    seed: int
    compressor: str
    lm: str  # as the config names it
    visual_tokens: int


@dataclasses.dataclass(frozen=True)
class Training:
    """The cells that one training serves: one, or with an elastic compressor every number of visual tokens."""

    seed: int
    compressor: str
    lm: str
    visual_tokens: tuple[int, ...]
    kind: str = ""  # which of COMPRESSORS the sweep's compressor is; "": the one of that name

    @property
    def name(self) -> str:
        counts = f"-v{self.visual_tokens[0]}" if len(self.visual_tokens) == 1 else ""
        return f"{self.compressor}-{label(self.lm)}{counts}"

    @property
    def cells(self) -> list[Cell]:
        return [Cell(self.seed, self.compressor, self.lm, v) for v in self.visual_tokens]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the config's sweep.stages; configs/default.py says what each field means."""

    name: str
    per: str
    cells: str
    compressor: str
    annotations: tuple[str, ...]
    image_roots: tuple[str, ...]
    trainable: str
    steps: int
    epochs: float
    batch_size: int
    text_tokens: int
    buckets: tuple[tuple[int, float], ...]
    records: int
    learning_rate: float
    muon_learning_rate: float
    decay_ratio: float
    init: Mapping[str, str]
    cached: bool
    settings: tuple[tuple[str, Any], ...]
    is_last: bool = False  # whether it is the end of a cell, which is evaluated

    def __post_init__(self):
        owner = f"sweep.stages.{self.name}"
        check_choice(owner, "per", self.per, PER)
        check_choice(owner, "cells", self.cells, CELLS)
        check_positive(owner, batch_size=self.batch_size, text_tokens=self.text_tokens)
        for part in self.init:
            check_choice(owner, "init", part, PARTS)
        if self.per != "cell" and not self.compressor:
            raise ConfigError(
                f"{owner}: is trained once per {self.per}, so it cannot have each cell's compressor; name one, such as "
                "compressor = 'identity'."
            )
        if self.steps <= 0 and not self.epochs > 0:
            raise ConfigError(f"{owner}: steps {self.steps} and epochs {self.epochs} make no step.")

    @property
    def sources(self) -> set[str]:
        """The stages that parts come from."""
        return set(filter(None, self.init.values()))

    @property
    def trains_lm(self) -> bool:
        return re.search(self.trainable, "lm/layers/mlp/up/kernel") is not None

    def serves(self, training: Training) -> bool:
        """Whether the stage is one of those that a training goes through."""
        if training.compressor == TEXT_ONLY and not self.trains_lm:
            return False
        kind = training.kind or training.compressor
        aware = kind not in BASELINES and compressors.get(kind).uses_query
        return self.cells == "all" or aware == (self.cells == "query_aware")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One benchmark of a sweep."""

    name: str
    annotations: str
    image_root: str  # "": the annotations'
    family: str


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the files of one seed are."""

    root: Path  # DIR/seed<k>
    inputs: Path  # from which relative paths of the config begin

    @property
    def data(self) -> Path:
        """What the prepare step wrote."""
        return self.root / "data"

    @property
    def features(self) -> Path:
        return self.root / "features"

    def stage(self, stage: Stage, training: Training, rerun: int = 0) -> Path:
        """The workdir of a stage that `training` goes through."""
        if stage.per == "seed":
            return self.root / stage.name
        if stage.per == "lm":
            return self.root / stage.name / label(training.lm)
        own = self.cell(training, rerun)
        return own if stage.is_last else own / stage.name

    def cell(self, training: Training, rerun: int = 0) -> Path:
        return self.root / "cells" / (training.name + (f"-rerun{rerun}" if rerun else ""))

    def answers(self, training: Training, visual_tokens: int, rerun: int = 0) -> Path:
        """The workdir of the evaluation of a cell."""
        several = len(training.visual_tokens) > 1
        return self.cell(training, rerun) / ("eval" + (f"-v{visual_tokens}" if several else ""))

    def last_rerun(self, training: Training) -> int:
        """The number of a training's last try, which counts."""
        return next(n for n in itertools.count() if not self.cell(training, n + 1).is_dir())

    def log(self, part: str) -> Path:
        return self.root / "logs" / f"{part}.txt"

    def path(self, given: str) -> str:
        """A path of the config; an absolute one, one of a bucket and "" stay."""
        return os.path.join(self.inputs, given) if given and not scheme(given) else given


def folders(cfg: ConfigDict, root: Path, seed: int) -> Folders:
    own = root / f"seed{seed}"
    return Folders(own, own / "data" if cfg.sweep.prepare else to_path(cfg.sweep.inputs))


def label(lm: str) -> str:
    """An LM's name in tables, parts and folders: the preset, or the last part of its directory."""
    return to_path(lm).name


def stages(cfg: ConfigDict) -> list[Stage]:
    """The stages, each after those it starts from. Raises ConfigError for a wrong field or a start that cannot be."""
    left = {}
    for name in cfg.sweep.stages:
        left[name] = build(Stage, {"name": name, **cfg.sweep.stages[name].to_dict()})
    if not any(stage.per == "cell" for stage in left.values()):
        raise ConfigError("sweep: stages has none that is trained per cell; add one.")
    for stage in left.values():
        for source in stage.sources:
            check_choice(f"sweep.stages.{stage.name}", "init", source, left)
            if PER.index(left[source].per) > PER.index(stage.per):
                raise ConfigError(
                    f"sweep.stages.{stage.name}: is trained once per {stage.per} and cannot start from {source!r}, which is "
                    f"trained per {left[source].per}."
                )
    begun = {source for stage in left.values() for source in stage.sources if stage.per == "cell"}
    for name, stage in left.items():
        left[name] = dataclasses.replace(stage, is_last=stage.per == "cell" and name not in begun)
    found: list[Stage] = []
    while left:
        ready = [s for s in left.values() if not s.sources & left.keys()]
        if not ready:
            raise ConfigError(
                f"sweep: stages {', '.join(left)} start from each other; none can be first."
            )
        found += ready
        for stage in ready:
            del left[stage.name]
    return found


def cell_stages(cfg: ConfigDict, training: Training) -> list[Stage]:
    """The stages that are trained for a training alone, in their order. Raises ConfigError when there is none."""
    found = [stage for stage in stages(cfg) if stage.per == "cell" and stage.serves(training)]
    if not found:
        raise ConfigError(
            f"sweep: no stage is for the cells of compressor {training.compressor!r}; add one to sweep.stages."
        )
    ends = [stage.name for stage in found if stage.is_last]
    if len(ends) != 1:
        raise ConfigError(
            f"sweep: cells of {training.compressor!r} end with stages {' and '.join(ends) or 'of other cells'}; exactly one "
            "stage, from which no other starts, is evaluated. Give one another `cells`, or an `init` from the other."
        )
    return found


def shared_stages(cfg: ConfigDict) -> list[Stage]:
    return [stage for stage in stages(cfg) if stage.per != "cell"]


def all_stages(cfg: ConfigDict, training: Training) -> list[Stage]:
    """What a training goes through: the stages it shares with others, then its own."""
    return [*shared_stages(cfg), *cell_stages(cfg, training)]


def cells(cfg: ConfigDict) -> list[Cell]:
    """Every cell, seed by seed: the product that the law is fitted to, then those beside it."""
    own = cfg.sweep.visual_tokens_of
    points = [
        (compressor, lm, v)
        for compressor in cfg.sweep.compressors
        for lm in cfg.sweep.lms
        for v in own.get(compressor, (0,) if compressor == TEXT_ONLY else cfg.sweep.visual_tokens)
    ]
    points += beside(cfg)
    if len(set(points)) < len(points) or not (points and cfg.sweep.seeds):
        raise ConfigError(
            "sweep: compressors, lms, visual_tokens and seeds must be given, each value once."
        )
    labels = [label(lm) for lm in dict.fromkeys(lm for _, lm, _ in points)]
    if twice := [name for name in dict.fromkeys(labels) if labels.count(name) > 1]:
        raise ConfigError(
            f"sweep: two LMs are called {twice[0]!r}; rename one directory: tables tell them apart by the last part."
        )
    for compressor, *_ in points:
        if compressor not in BASELINES:
            compressors.get(kind(cfg, compressor))
    return [Cell(seed, *point) for seed in cfg.sweep.seeds for point in points]


def beside(cfg: ConfigDict) -> list[tuple[str, str, int]]:
    """(compressor, LM, visual tokens) of the cells that are shown beside the law."""
    try:
        return [(str(compressor), str(lm), int(v)) for compressor, lm, v in cfg.sweep.beside]
    except (TypeError, ValueError):
        raise ConfigError(
            f"sweep: beside must be triples (compressor, LM, visual tokens); got {cfg.sweep.beside!r}."
        ) from None


def kind(cfg: ConfigDict, compressor: str) -> str:
    """Which of COMPRESSORS a compressor of the sweep is: the `name` of its settings, else the one of its own name."""
    own = cfg.sweep.compressor_settings
    return own[compressor].get("name", compressor) if compressor in own else compressor


def is_elastic(cfg: ConfigDict, compressor: str) -> bool:
    """Whether one training per LM serves all numbers of visual tokens of a compressor."""
    known = compressor not in BASELINES and compressors.get(kind(cfg, compressor)).elastic
    return known and cfg.sweep.elastic


def query_aware(cfg: ConfigDict) -> set[str]:
    """The compressors of the cells that look at the question."""
    names = {cell.compressor for cell in cells(cfg)} - set(BASELINES)
    return {name for name in names if compressors.get(kind(cfg, name)).uses_query}


def trainings(cfg: ConfigDict) -> list[Training]:
    """What is trained, in the order of `cells`."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells(cfg):
        alone = cell.visual_tokens if not is_elastic(cfg, cell.compressor) else 0
        groups.setdefault((cell.seed, cell.compressor, cell.lm, alone), []).append(cell)
    return [
        Training(
            seed, compressor, lm, tuple(cell.visual_tokens for cell in group), kind(cfg, compressor)
        )
        for (seed, compressor, lm, _), group in groups.items()
    ]


def asked(cfg: ConfigDict) -> list[Asked]:
    """The benchmarks, with paths as the config gives them. Raises ConfigError for unknown names and lists of other lengths."""
    s = cfg.sweep
    names: Sequence[str] = s.benchmarks
    if not names:
        raise ConfigError("sweep: benchmarks is empty; name one or more.")
    columns = {"annotations": s.annotations, "image_roots": s.image_roots, "families": s.families}
    for field, values in columns.items():
        if values and len(values) != len(names):
            raise ConfigError(
                f"sweep: {len(names)} benchmarks but {len(values)} {field}; give one per benchmark, or () for the default."
            )
    filled = [values or [""] * len(names) for values in columns.values()]
    return [
        Asked(name, annotations or ".", root, family or benchmarks.get(name).family)
        for name, annotations, root, family in zip(names, *filled, strict=True)
    ]
