"""python -m vlm_jax.sweep --config=configs/mini.py --workdir=DIR: every (LM, visual tokens) cell, the law, the report.

    DIR/seed0/{data,encoder,features,text/<lm>}          what the cells of one seed share
    DIR/seed0/cells/<compressor>-<lm>-v<tokens>          one training and its evaluation
    DIR/seed0/logs/<part>.txt                            what a part logged, if it ran beside others
    DIR/errors.csv  reruns.json  law.json  *.png  *.svg  report.md  report.html

Parts that do not need each other run side by side, each on one core (sweep.processes). Finished parts are skipped and
others are resumed, so the same command continues a sweep that was killed.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from vlm_jax import benchmarks, files, parts
from vlm_jax.hf import named
from vlm_jax.inference import evaluation
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.laws import fitting, law, outliers, report, table
from vlm_jax.laws.report import Picture
from vlm_jax.laws.table import spell_pair
from vlm_jax.miniworld import CAVEATS, generate
from vlm_jax.parts import Clock, Part
from vlm_jax.settings import cli, presets
from vlm_jax.settings.checks import ConfigError, build, check_choice
from vlm_jax.settings.model import stride_for
from vlm_jax.settings.run import MeshConfig
from vlm_jax.show import show
from vlm_jax.stages import QUERY_AWARE, Cell, Shared, cell_stage, encoder_stage, text_stage, work
from vlm_jax.storage import run as experiment
from vlm_jax.train import train

log = logging.getLogger(__name__)

LOOKED_AT = "mini_ocr"  # the benchmark whose pictures show where a query-aware cell looks
SHARED = "shared"  # the part that all cells start from
RETRY_SEED = 1000  # a failed cell's k-th rerun draws its seeds from seed + k * RETRY_SEED


class Tried(NamedTuple):
    """What running a cell gave: its tries, of which the last one counts."""

    cell: Cell
    tries: list[outliers.Try]


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
    processes = parts.how_many(cfg.sweep.processes, len(todo))
    todo_parts = []
    for seed in cfg.sweep.seeds:
        shared = Shared(root / f"seed{seed}")
        todo_parts += shared_parts(cfg, seed, todo, shared)
        todo_parts += [cell_part(cfg, cell, shared) for cell in todo if cell.seed == seed]
    tries: dict[Cell, list[outliers.Try]] = {}
    while todo_parts:
        for tried in run(todo_parts, processes, root, clock):
            tries[tried.cell] = [*tries.get(tried.cell, ()), *tried.tries]
            write_table(root / "errors.csv", todo, tries)
        tries = outliers.judged({cell: tries[cell] for cell in todo})
        todo_parts = [
            cell_part(cfg, cell, Shared(root / f"seed{cell.seed}"), first=len(own))
            for cell, own in tries.items()
            if own[-1].fault and len(own) <= cfg.sweep.max_reruns
        ]
    write_table(root / "errors.csv", todo, tries)
    return conclude(cfg, root, made_by, outliers.stories(tries), clock)


def sweep_part(cfg: ConfigDict, workdir: str, part: str) -> None:
    """Runs the part of one of several machines: "shared", or the cells "I/N". No table is written: only one process may.

    Raises ConfigError for another `part`, and for cells whose shared parts are not finished.
    """
    todo = cells(cfg)
    mine = share_of(todo, part)
    check_stages(cfg, todo)
    root = experiment.open_workdir(workdir)
    clock = Clock(root / f"timing.{part.replace('/', '_of_')}.json")
    todo_parts = []
    for seed in cfg.sweep.seeds if part == SHARED else ():
        todo_parts += shared_parts(cfg, seed, todo, Shared(root / f"seed{seed}"))
    for cell in mine:
        shared = Shared(root / f"seed{cell.seed}")
        for folder in (shared.encoder, shared.text(cell.lm)):
            if not shared.features.is_dir() or experiment.finished(folder) is None:
                raise ConfigError(
                    f"--part: {folder} is not finished; run --part={SHARED} to its end before any --part=I/N."
                )
        todo_parts.append(cell_part(cfg, cell, shared))
    list(run(todo_parts, parts.how_many(cfg.sweep.processes, len(todo_parts)), root, clock))


def run(todo: Sequence[Part], processes: int, root: Path, clock: Clock) -> Iterator[Tried]:
    """Runs the parts with a line for each, and yields what the cells among them gave."""
    finished = parts.run(todo, processes, root / "compiled")
    with contextlib.closing(finished):
        for number, (part, value, seconds) in enumerate(finished, 1):
            clock.note(part.name, seconds)
            errors = f": {value.tries[-1].errors}" if isinstance(value, Tried) else ""
            log.info("%d/%d %s, %.0f s%s", number, len(todo), part.name, seconds, errors)
            if isinstance(value, Tried):
                yield value


def share_of(todo: Sequence[Cell], part: str) -> list[Cell]:
    """The cells of `part` "I/N": every N-th from the I-th, which mixes sizes and token counts. None for "shared"."""
    if part == SHARED:
        return []
    first, _, step = part.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise ConfigError(f"--part: {part!r} is neither {SHARED!r} nor I/N with 0 <= I < N.")
    return list(todo[int(first) :: int(step)])


# --- what the cells share ---------------------------------------------------------------------------------------------


def shared_parts(cfg: ConfigDict, seed: int, todo: Sequence[Cell], shared: Shared) -> list[Part]:
    """What makes everything that the cells of one seed start from. Finished parts return at once."""
    data, encoder, features = (f"seed {seed}: {name}" for name in ("data", "encoder", "features"))
    c = encoder_stage(cfg, seed, shared)
    found = [
        Part(data, write_data, (cfg, seed, shared), shared.log("data")),
        Part(encoder, train, (c, str(shared.encoder)), shared.log("encoder"), (data,), work(c)),
        Part(features, cache_features, (cfg, shared), shared.log("features"), (encoder,)),
    ]
    for lm in dict.fromkeys(cell.lm for cell in todo):
        c, name = text_stage(cfg, seed, lm, shared), f"seed {seed}: text {lm}"
        arguments = (c, str(shared.text(lm)))
        found.append(Part(name, train, arguments, shared.log(f"text-{lm}"), (data,), work(c)))
    return found


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


def cache_features(cfg: ConfigDict, shared: Shared) -> None:
    """The frozen encoder's features of every image of the seed, training and test, written once."""
    if shared.features.is_dir():
        return
    # Here, not above: jax takes seconds, mistakes are answered before.
    from vlm_jax.inference import features

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


def cell_part(cfg: ConfigDict, cell: Cell, shared: Shared, first: int = 0) -> Part:
    """A cell as a part; first: the number of its first try."""
    name = f"{cell}-rerun{first}" if first else str(cell)
    needs = (f"seed {cell.seed}: features", f"seed {cell.seed}: text {cell.lm}")
    cost = work(cell_stage(cfg, cell, shared, cell.seed))
    return Part(name, run_cell, (cfg, cell, shared, first), shared.log(cell.name), needs, cost)


def run_cell(cfg: ConfigDict, cell: Cell, shared: Shared, first: int = 0) -> Tried:
    """Trains and evaluates a cell, again with other seeds while an error stays at chance, from the try `first` on."""
    tries: list[outliers.Try] = []
    for attempt in range(first, cfg.sweep.max_reruns + 1):
        seed = cell.seed + attempt * RETRY_SEED
        folder = shared.root / "cells" / (cell.name + (f"-rerun{attempt}" if attempt else ""))
        out = folder / "eval"
        train(cell_stage(cfg, cell, shared, seed), str(folder))
        rows = evaluate_cell(cfg, folder, out, shared.data, str(shared.features), cell.seed)
        failed = [row for row in rows if row.error >= cfg.sweep.failed_above]
        if not failed:
            tries.append(outliers.Try(seed, rows))
            break
        fault = f"{failed[0].benchmark} stays at chance (error {failed[0].error:.3f})"
        log.warning("%s: %s", folder, fault)
        flagged = [dataclasses.replace(row, flag=outliers.CHANCE) for row in rows]
        tries.append(outliers.Try(seed, flagged, fault))
    return Tried(cell, tries)


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


def write_table(path: Path, todo: Sequence[Cell], tries: Mapping[Cell, list[outliers.Try]]) -> None:
    """Writes the rows of the cells so far in the order of the plan, then those that are there from other plans."""
    rows = [row for cell in todo if cell in tries for row in tries[cell][-1].rows]
    keys = {row.key for row in rows}
    others = [row for row in table.read(path) if row.key not in keys] if path.is_file() else []
    table.write(path, [*rows, *others])


def looks(cfg: ConfigDict, cell: Cell, root: Path) -> list[Picture]:
    """Where a query-aware cell looks on one sheet, asked for two different squares; drawn into `root`."""
    shared = Shared(root / f"seed{cell.seed}")
    c = copy.deepcopy(cfg)
    c.eval.checkpoint = str(shared.root / "cells" / cell.name)
    rows = benchmarks.get(LOOKED_AT).rows(str(shared.data))
    # The sheet with the most different answers, and two of its squares.
    sheets: dict[str, dict[str, str]] = {}
    for row in rows:
        question = row["conversations"][-1]["value"].removeprefix("<image>").strip()
        if question.startswith("read "):
            sheets.setdefault(row["image"], {})[row["answer"]] = question
    image, asked = max(sheets.items(), key=lambda sheet: len(sheet[1]))
    found = []
    for number, question in enumerate(list(asked.values())[:2], 1):
        name = f"looks_{cell.compressor}_{number}.png"
        show(c, str(shared.data / image), question, str(root / name))
        asked_of = f"{cell.compressor}, {spell_pair(cell.lm, cell.visual_tokens)}"
        found.append(Picture(name, f"{asked_of}, asked to {question!r}"))
    return found


def conclude(cfg: ConfigDict, root: Path, made_by: str, notes: Sequence[str], clock: Clock) -> Path:
    """Fits one law per family and writes law.json, reruns.json, the figures and the report. notes: of the reruns."""
    rows = table.read(root / "errors.csv")
    aware = [cell for cell in cells(cfg) if cell.compressor == QUERY_AWARE]
    options = {"fixed_d": cfg.sweep.fixed_d}
    fits = fitting.fit_table(rows, **options)
    law.save(root / "law.json", fits, law.provenance("errors.csv", made_by, options))
    files.write_whole(root / "reruns.json", json.dumps(notes, indent=1))
    return report.write_report(
        root, rows, fits, title="The miniature: LM size against visual tokens", made_by=made_by,
        text_tokens=cfg.sweep.plan_text_tokens, budget_gflops=cfg.sweep.plan_budget_gflops, notes=notes,
        pictures=looks(cfg, aware[0], root) if aware else (), caveats=CAVEATS, seconds=clock.seconds,
    )  # fmt: skip


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
