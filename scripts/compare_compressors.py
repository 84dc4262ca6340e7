#!/usr/bin/env python3
"""The miniature with every compressor at equal steps: compressor x visual tokens x family error.

scripts/compare_compressors.py --config=configs/mini_compressors.py --workdir=runs/compressors

World, encoder and text-trained decoder are those of `vlm_jax.sweep` (and are taken over if the workdir has them). Every
row trains for the same steps on as many questions per step; an elastic compressor trains once and answers at each of its
counts. Writes compressors.csv (schema of laws/table.py) and compressors.md.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package and its configs, from a checkout

from vlm_jax import compressors, stages, sweep  # noqa: E402
from vlm_jax.hf import named  # noqa: E402
from vlm_jax.laws import table  # noqa: E402
from vlm_jax.settings import cli  # noqa: E402
from vlm_jax.settings.checks import ConfigError  # noqa: E402
from vlm_jax.storage import run as experiment  # noqa: E402
from vlm_jax.train import train  # noqa: E402

log = logging.getLogger("vlm_jax.compare_compressors")


def rows_of(cfg: Any, name: str, shared: stages.Shared, seed: int) -> list[table.Row]:
    """Trains one compressor at each of its counts (once, if it is elastic) and evaluates it at each."""
    counts, rows = cfg.compare.visual_tokens[name], []
    elastic = compressors.get(name).elastic
    for count in counts:
        c = training(cfg, name, count, shared, seed)
        folder = shared.root / "compared" / (name if elastic else f"{name}-v{count}")
        train(c, str(folder))
        asked = copy.deepcopy(cfg)
        if elastic:
            asked.eval.visual_tokens = count
        out = folder / f"eval-v{count}"
        found = sweep.evaluate_cell(asked, folder, out, shared.data, c.data.features_dir, seed)
        rows += found
        log.info("%s V=%d: %s", name, count, "  ".join(f"{r.benchmark} {r.error:.3f}" for r in found))  # fmt: skip
    return rows


def training(cfg: Any, name: str, count: int, shared: stages.Shared, seed: int) -> Any:
    """The stage of the miniature's cells with another compressor."""
    entry = compressors.get(name)
    c = stages.stage(cfg, seed, "query_aware_vlm" if entry.uses_query else "vlm", shared)
    own = {field: cfg.compare[field] for field in ("query_grid", "neighbours") if field in compressors.settings_of(name)}  # fmt: skip
    compressors.choose(c.model.compressor, name, **own)
    c.model.compressor.unlock()
    grid = named.vlm(c.model.to_dict()).vit.grid
    c.data.features_dir = str(shared.features)
    if entry.uses_scores:
        c.data.features_dir = (
            ""  # they look at the encoder's queries and keys, which are not cached
        )
        c.model.compressor.prune_ratio = "fixed"
        c.model.compressor.fixed_ratio = ratio_for(c, grid, count)
    if entry.elastic:
        c.model.compressor.train_tokens = tuple(cfg.compare.visual_tokens[name])
    elif not entry.uses_scores:
        model = named.vlm(c.model.to_dict())
        sized = compressors.with_tokens(model.compressor, grid, count)
        c.model.compressor.update(dataclasses.asdict(sized))
    model = experiment.resolve(c).model
    c.data.max_tokens += compressors.num_tokens(
        compressors.for_training(model).compressor, model.vit.grid
    )
    c.init.vit, c.init.lm = str(shared.encoder), str(shared.text(c.model.lm.preset))
    return c


def markdown(rows: Sequence[table.Row], made_by: str) -> str:
    """Per family: compressors down, visual tokens across; mean over seeds, and the range when there are several."""
    lines = [f"    {made_by}"]
    counts = sorted({row.visual_tokens for row in rows})
    for family in sorted({row.family for row in rows}):
        lines += ["", f"| {family} error | {' | '.join(f'V = {v}' for v in counts)} |", "|---|" + "---|" * len(counts)]  # fmt: skip
        for name in dict.fromkeys(row.compressor for row in rows):
            own = [row for row in rows if (row.family, row.compressor) == (family, name)]
            cells = [[row.error for row in own if row.visual_tokens == v] for v in counts]
            lines.append(f"| {name} | {' | '.join(map(shown, cells))} |")
    return "\n".join(lines) + "\n"


def shown(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    spread = f" ({min(errors):.3f}–{max(errors):.3f})" if len(errors) > 1 else ""
    return f"{sum(errors) / len(errors):.3f}{spread}"


def ratio_for(c: Any, grid: int, count: int) -> float:
    """The share of the patches that PruMerge keeps by score when it gives `count` tokens."""
    for kept in range(1, grid**2):
        c.model.compressor.fixed_ratio = kept / grid**2
        if compressors.num_tokens(named.vlm(c.model.to_dict()).compressor, grid) == count:
            return kept / grid**2
    raise ConfigError(f"{c.model.compressor.name} cannot give {count} tokens of a {grid}x{grid} grid.")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    flags = cli.parse(argv, {"workdir": "directory of the comparison, or of a finished miniature sweep"}, about=__doc__ or "")  # fmt: skip
    cfg, rows = flags.config, []
    root = experiment.open_workdir(flags.workdir)
    for seed in cfg.sweep.seeds:
        shared = stages.Shared(root / f"seed{seed}")
        sweep.write_data(cfg, seed, shared)
        train(stages.encoder_stage(cfg, seed, shared), str(shared.encoder))
        sweep.cache_features(cfg, shared)
        train(stages.text_stage(cfg, seed, cfg.model.lm.preset, shared), str(shared.text(cfg.model.lm.preset)))  # fmt: skip
        for name in cfg.compare.visual_tokens:
            rows += rows_of(cfg, name, shared, seed)
            table.append(root / "compressors.csv", rows)
    made_by = shlex.join(["scripts/compare_compressors.py", *argv])
    (root / "compressors.md").write_text(markdown(rows, made_by), encoding="utf-8")
    sys.stdout.write(markdown(rows, made_by))


if __name__ == "__main__":
    sys.exit(cli.run(main))
