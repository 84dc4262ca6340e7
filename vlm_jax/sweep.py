"""python -m vlm_jax.sweep --config=configs/mini.py --workdir=DIR: every (LM, visual tokens) cell, the law, the report.

    DIR/seed0/{data,encoder,features,text/<lm>}          what the cells of one seed share
    DIR/seed0/cells/<compressor>-<lm>-v<tokens>          one training and its evaluation
    DIR/errors.csv  law.json  *.png  *.svg  report.md  report.html

Finished parts are skipped and others are resumed, so the same command continues a sweep that was killed.
On several machines that share DIR (scripts/sweep_array.sh), `--part=shared` makes what the cells share and `--part=I/N` runs
every N-th cell from the I-th on (0 <= I < N). The command without --part then writes the table, the law and the report.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import shlex
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax import benchmarks, compressors, files
from vlm_jax.hf import named
from vlm_jax.inference import evaluation
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.laws import fit, law, report, table
from vlm_jax.miniworld import CAVEATS, generate
from vlm_jax.settings import cli, presets
from vlm_jax.settings.checks import ConfigError, build, check_choice
from vlm_jax.settings.model import stride_for
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.train import train

log = logging.getLogger(__name__)

QUERY_AWARE = "quecc"
SHARED = "shared"  # the part that all cells start from
RETRY_SEED = 1000  # a failed cell's k-th rerun draws its seeds from seed + k * RETRY_SEED


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the sweep."""

    seed: int
    compressor: str
    lm: str
    visual_tokens: int

    @property
    def name(self) -> str:
        return f"{self.compressor}-{self.lm}-v{self.visual_tokens}"


@dataclasses.dataclass(frozen=True)
class Shared:
    """The directories below seed<k>/ that all cells of one seed share."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def encoder(self) -> Path:
        return self.root / "encoder"

    @property
    def features(self) -> Path:
        return self.root / "features"

    def text(self, lm: str) -> Path:
        return self.root / "text" / lm


def cells(cfg: ConfigDict) -> list[Cell]:
    """The cells that the law is fitted to and the query-aware ones shown beside it, seed by seed, with all names checked."""
    model = named.vlm(cfg.model.to_dict())
    check_choice("sweep", "model.compressor.name", model.compressor.name, ("tokenpacker",))
    points = [
        (model.compressor.name, lm, v) for lm in cfg.sweep.lms for v in cfg.sweep.visual_tokens
    ]
    points += [(QUERY_AWARE, lm, v) for lm, v in cfg.sweep.query_aware]
    for _, lm, visual_tokens in points:
        presets.lm(lm)
        stride_for(model.vit.grid, visual_tokens)
    if len(set(points)) < len(points) or not cfg.sweep.seeds:
        raise ConfigError("sweep: lms, visual_tokens and seeds must be given, each value once.")
    return [Cell(seed, *point) for seed in cfg.sweep.seeds for point in points]


def check_stages(cfg: ConfigDict, todo: Sequence[Cell]) -> None:
    """Raises ConfigError now for a setting that a training or an evaluation would refuse hours later."""
    nowhere = Shared(Path("seed"))
    for cell in todo:
        experiment.resolve(cell_stage(cfg, cell, nowhere, cell.seed))
        experiment.resolve(text_stage(cfg, cell.seed, cell.lm, nowhere))
    experiment.resolve(encoder_stage(cfg, todo[0].seed, nowhere))
    for name in cfg.sweep.benchmarks:
        benchmarks.get(name)


def sweep(cfg: ConfigDict, workdir: str, made_by: str) -> Path:
    """Runs what is missing and writes the report; returns its path. `made_by` is the command to print in it."""
    todo = cells(cfg)
    check_stages(cfg, todo)
    root = experiment.open_workdir(workdir)
    clock = Clock(root / "timing.json", sorted(root.glob("timing.*.json")))
    for seed in cfg.sweep.seeds:
        shared = Shared(root / f"seed{seed}")
        prepare(cfg, seed, todo, shared, clock)
        for cell in (cell for cell in todo if cell.seed == seed):
            with clock.part(f"seed {seed}: {cell.name}"):
                rows = run_cell(cfg, cell, shared)
            table.append(root / "errors.csv", rows)
            errors = "  ".join(
                f"{row.benchmark} {row.error:.3f}{' ' + row.flag if row.flag else ''}"
                for row in rows
            )
            log.info(
                "%d/%d seed %d %s: %s", todo.index(cell) + 1, len(todo), seed, cell.name, errors
            )
    return conclude(cfg, root, made_by, clock)


def sweep_part(cfg: ConfigDict, workdir: str, part: str) -> None:
    """Runs the part of one of several machines: "shared", or the cells "I/N". No table is written: only one process may.

    Raises ConfigError for another `part`, and for cells whose shared parts are not finished.
    """
    todo = cells(cfg)
    mine = share_of(todo, part)
    check_stages(cfg, todo)
    root = experiment.open_workdir(workdir)
    clock = Clock(root / f"timing.{part.replace('/', '_of_')}.json")
    if part == SHARED:
        for seed in cfg.sweep.seeds:
            prepare(cfg, seed, todo, Shared(root / f"seed{seed}"), clock)
        return
    for cell in mine:
        shared = Shared(root / f"seed{cell.seed}")
        for folder in (shared.encoder, shared.text(cell.lm)):
            if not shared.features.is_dir() or experiment.finished(folder) is None:
                raise ConfigError(
                    f"--part: {folder} is not finished; run --part={SHARED} to its end before any --part=I/N."
                )
        with clock.part(f"seed {cell.seed}: {cell.name}"):
            run_cell(cfg, cell, shared)


def share_of(todo: Sequence[Cell], part: str) -> list[Cell]:
    """The cells of `part` "I/N": every N-th from the I-th, which mixes sizes and token counts. None for "shared"."""
    if part == SHARED:
        return []
    first, _, step = part.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ConfigError(f"--part: {part!r} is neither {SHARED!r} nor I/N with 0 <= I < N.")
    return list(todo[int(first) :: int(step)])


# --- what the cells share ---------------------------------------------------------------------------------------------


def prepare(cfg: ConfigDict, seed: int, todo: Sequence[Cell], shared: Shared, clock: Clock) -> None:
    """Makes everything that the cells of one seed start from. Finished parts return at once."""
    with clock.part(f"seed {seed}: data"):
        write_data(cfg, seed, shared)
    with clock.part(f"seed {seed}: encoder"):
        train(encoder_stage(cfg, seed, shared), str(shared.encoder))
    with clock.part(f"seed {seed}: features"):
        cache_features(cfg, shared)
    for lm in dict.fromkeys(cell.lm for cell in todo):
        with clock.part(f"seed {seed}: text {lm}"):
            train(text_stage(cfg, seed, lm, shared), str(shared.text(lm)))


def write_data(cfg: ConfigDict, seed: int, shared: Shared) -> None:
    done = shared.data / "complete"
    sizes = {
        "num_train_images": cfg.sweep.train_images,
        "num_test_images": cfg.sweep.test_images,
        "num_encoder_images": cfg.sweep.encoder_images,
        "num_text_records": cfg.sweep.text_records,
    }
    made = json.dumps(sizes)
    if done.is_file():
        if done.read_text() != made:
            raise ConfigError(
                f"sweep: {shared.data} was made with {done.read_text()}, now {made}; use another workdir."
            )
        return
    generate.write(shared.data, seed, **sizes)
    files.write_whole(done, made)


def stage(cfg: ConfigDict, seed: int, name: str, shared: Shared) -> ConfigDict:
    """A copy of `cfg` with the settings of sweep.<name>, on the miniature's files and with its seeds."""
    settings = cfg.sweep[name]
    c = copy.deepcopy(cfg)
    c.train.num_steps = settings.steps
    c.train.save_every = settings.steps
    c.train.seed = c.data.seed = seed
    c.optim.trainable = settings.trainable
    c.optim.learning_rate = settings.learning_rate
    c.optim.muon_learning_rate = settings.muon_learning_rate
    c.data.annotations = (str(shared.data / settings.annotations),)
    c.data.image_roots = (str(shared.data),)
    c.data.tokenizer = str(shared.data / "tokenizer")
    c.data.batch_size = settings.batch_size
    c.data.max_tokens = settings.text_tokens
    return c


def encoder_stage(cfg: ConfigDict, seed: int, shared: Shared) -> ConfigDict:
    """Training of the encoder: inside a VLM without compression, with all parameters trainable."""
    c = stage(cfg, seed, "encoder", shared)
    compressors.choose(c.model.compressor, "identity")
    c.data.max_tokens += named.vlm(c.model.to_dict()).vit.num_patches
    return c


def text_stage(cfg: ConfigDict, seed: int, lm: str, shared: Shared) -> ConfigDict:
    """Training of the language model on text alone."""
    c = stage(cfg, seed, "text", shared)
    c.model.lm.preset = lm
    c.data.max_images = 0
    return c


def cell_stage(cfg: ConfigDict, cell: Cell, shared: Shared, seed: int) -> ConfigDict:
    """Training of compressor, projector and language model on the cached features of the frozen encoder."""
    c = stage(cfg, seed, "query_aware_vlm" if cell.compressor == QUERY_AWARE else "vlm", shared)
    c.model.lm.preset = cell.lm
    stride = stride_for(named.vlm(c.model.to_dict()).vit.grid, cell.visual_tokens)
    compressors.choose(c.model.compressor, cell.compressor, stride=stride)
    c.data.max_tokens += cell.visual_tokens
    c.data.features_dir = str(shared.features)
    c.init.vit = str(shared.encoder)
    c.init.lm = str(shared.text(cell.lm))
    return c


def cache_features(cfg: ConfigDict, shared: Shared) -> None:
    """The frozen encoder's features of every image of the seed, training and test, written once."""
    if shared.features.is_dir():
        return
    from vlm_jax.inference import (
        features,
    )  # here, not above: jax takes seconds, mistakes are answered before

    annotations = [
        cfg.sweep.vlm.annotations,
        *(f"{name}_test.json" for name in ("reasoning", "ocr")),
    ]
    c = encoder_stage(cfg, 0, shared)
    c.data.annotations = tuple(str(shared.data / name) for name in annotations)
    c.data.image_roots = (str(shared.data),) * len(annotations)
    c.model.compressor = copy.deepcopy(cfg.model.compressor)  # its taps are cached too
    c.init.vit = str(shared.encoder)
    features.cache(experiment.resolve(c), shared.features)


# --- one cell ---------------------------------------------------------------------------------------------------------


def run_cell(cfg: ConfigDict, cell: Cell, shared: Shared) -> list[table.Row]:
    """Trains and evaluates a cell, again with other seeds while an error stays at chance; in the end such rows are flagged."""
    rows: list[table.Row] = []
    for attempt in range(cfg.sweep.max_reruns + 1):
        seed = cell.seed + attempt * RETRY_SEED
        folder = shared.root / "cells" / (cell.name + (f"-rerun{attempt}" if attempt else ""))
        train(cell_stage(cfg, cell, shared, seed), str(folder))
        rows = evaluate_cell(
            cfg, folder, folder / "eval", shared.data, str(shared.features), cell.seed
        )
        failed = [row for row in rows if row.error >= cfg.sweep.failed_above]
        if not failed:
            return rows
        log.warning(
            "%s: %s stays at chance (error %.3f)", folder, failed[0].benchmark, failed[0].error
        )
    return [dataclasses.replace(row, flag="chance level") for row in rows]


def evaluate_cell(
    cfg: ConfigDict, folder: Path, out: Path, data: Path, features_dir: str, seed: int
) -> list[table.Row]:
    """The rows of a training run on the miniature's benchmarks, with answers kept in `out` and the settings of `cfg.eval`."""
    names = tuple(cfg.sweep.benchmarks)
    asked = {"benchmarks": names, "annotations": (str(data),) * len(names)}
    model = {"checkpoint": str(folder), "features_dir": features_dir}
    settings = EvalConfig.from_block(cfg.eval.to_dict() | asked | model)
    evaluation.evaluate(settings, build(MeshConfig, cfg.mesh.to_dict()), str(out))
    return [dataclasses.replace(row, seed=seed) for row in table.read(out / "errors.csv")]


# --- after the cells --------------------------------------------------------------------------------------------------


def conclude(cfg: ConfigDict, root: Path, made_by: str, clock: Clock) -> Path:
    """Fits one law per family and writes law.json, the figures and the report."""
    rows = table.read(root / "errors.csv")
    options = {"fixed_d": cfg.sweep.fixed_d}
    fits = fit.fit_table(rows, **options)
    law.save(root / "law.json", fits, law.provenance("errors.csv", made_by, options))
    return report.write_report(
        root, rows, fits, title="The miniature: LM size against visual tokens", made_by=made_by,
        text_tokens=cfg.sweep.plan_text_tokens, budget_gflops=cfg.sweep.plan_budget_gflops, caveats=CAVEATS,
        seconds=clock.seconds,
    )  # fmt: skip


class Clock:
    """Wall-clock seconds of each part, kept in a file for when the sweep is resumed. others: the files of other machines."""

    def __init__(self, path: Path, others: Sequence[Path] = ()):
        self.path = path
        self.seconds: dict[str, float] = {}
        for known in (*others, path):
            if known.is_file():
                self.seconds |= files.read_json(known)

    @contextlib.contextmanager
    def part(self, name: str) -> Generator[None, None, None]:
        log.info("%s ...", name)
        start = time.monotonic()
        yield
        self.seconds.setdefault(name, round(time.monotonic() - start, 1))
        files.write_whole(self.path, json.dumps(self.seconds, indent=1))


def command(argv: Sequence[str]) -> None:
    texts = {
        "workdir": "directory of the sweep",
        "part": "shared, or I/N: every N-th cell from the I-th; not given: everything that is missing, and the report",
    }
    flags = cli.parse(argv, texts, about=__doc__ or "")
    if flags.part:
        sweep_part(flags.config, flags.workdir, flags.part)
        return
    made_by = shlex.join(["python", "-m", "vlm_jax.sweep", *argv])
    path = sweep(flags.config, flags.workdir, made_by)
    log.info("report: %s", path)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
