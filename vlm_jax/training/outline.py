"""What a training run is about to do, and what it did: the lines that a command prints at the start and at the end. No jax."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LORA
from vlm_jax.settings.run import Experiment

Say = Callable[[str], None]  # is given one line at a time
Tree = Mapping[str, Any]  # parameters, or what has their shapes, as nested dicts


def silent(line: str) -> None:
    """For callers that want no lines."""


class Part(NamedTuple):
    """A top-level part of the model: numbers of parameters, and where they come from ("": random)."""

    name: str
    trained: int
    frozen: int
    source: str


def parts(exp: Experiment, trainable: Tree, frozen: Tree) -> list[Part]:
    """The parts that have parameters, in the order in which an image passes them."""
    found = []
    for name, source in exp.init.sources.items():
        learns, stays = (
            sum(size for _, size in _sizes(tree.get(name, {}))) for tree in (trainable, frozen)
        )
        if learns or stays:
            found.append(Part(name, learns, stays, source))
    return found


def check_frozen(exp: Experiment, trainable: Tree, frozen: Tree) -> None:
    """Raises ConfigError when a part that does not learn would keep random parameters, unless that was asked for.

    Adapters do not count: they begin as nothing. A run on text alone uses the decoder only.
    """
    if exp.train.random_frozen:
        return
    used = ("lm",) if exp.data.max_images == 0 else tuple(exp.init.sources)
    names = {
        part.name: f"{part.name} ({short(part.frozen)} parameters)"
        for part in parts(exp, trainable, frozen)
        if part.name in used and not part.source
        if any(path.split("/")[-1] not in LORA for path, _ in _sizes(frozen.get(part.name, {})))
    }
    if not names:
        return
    flags = " ".join(f"--config.init.{name}=DIR" for name in names)
    raise ConfigError(
        f"train: {' and '.join(names.values())} would be FROZEN and RANDOM: nothing names where "
        f"{'it comes' if len(names) == 1 else 'they come'} from, and optim.trainable {exp.optim.trainable!r} does not train "
        f"{'it' if len(names) == 1 else 'them'}. Give {flags} (a model directory, whose path is also the preset, or a run), "
        "or --config.init.from=RUN for all parts; if it is meant, --config.train.random_frozen=True."
    )


def _sizes(tree: Tree, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _sizes(node, f"{prefix}{name}/")
        else:
            yield prefix + name, math.prod(node.shape)


def opening(files: int, workdir: str | Path, done: int | None) -> str:
    """The first line, before anything slow. files: how many annotation files there are."""
    state = f"goes on after step {done}" if done else "a new run"
    return f"{shown(workdir)}: {state}; loading jax and opening {files} annotation file{'s' * (files > 1)} ..."


def start(
    exp: Experiment,
    trainable: Tree,
    frozen: Tree,
    *,
    visual_tokens: int,
    num_records: int,
    num_steps: int,
    done: int,
    devices: str,
) -> list[str]:
    """The lines once all sizes are known, before weights are read and the step is compiled."""
    data, vit, lm = exp.data, exp.model.vit, exp.model.lm
    names = ", ".join(shown(path) for path in data.annotations)
    roots = ", ".join(shown(root) for root in dict.fromkeys(data.image_roots) if root) or "none"
    drawn = num_steps * data.batch_size / max(num_records, 1)
    rows = "packed rows" if data.packing else "records"
    every = parts(exp, trainable, frozen)
    origin = f"step {done} of this run" if done else ""
    learning = ", ".join(_trained(part, origin) for part in every if part.trained)
    still = ", ".join(_frozen(part, origin) for part in every if not part.trained)
    images = "no images" if not data.max_images else (
        f"images of {vit.image_px} px = {vit.num_patches} patches -> {exp.model.compressor.name}: "
        f"V = {visual_tokens} visual tokens"
    )  # fmt: skip
    return [
        f"  data     {num_records:,} records of {names}; images in {roots}",
        f"  model    {images} -> decoder of {lm.num_layers} layers, width {lm.width}; T = {data.max_tokens} tokens per row; "
        f"template {data.template}, tokenizer {shown(data.tokenizer)}",
        f"  trained  {learning}",
        f"  frozen   {still or 'nothing'}",
        f"  steps    {num_steps:,} of {data.batch_size} {rows}"
        + ("" if data.packing else f" = {drawn:.3g} epochs")
        + f" on {devices}; {exp.optim.optimizer}, rate {exp.optim.learning_rate:g}; compiling the first step ...",
    ]


def _trained(part: Part, origin: str) -> str:
    total = part.trained + part.frozen
    size = short(part.trained) + (f" of {short(total)}" if part.frozen else "")
    return f"{part.name} {size} ({_source(part, origin)})"


def _frozen(part: Part, origin: str) -> str:
    return f"{part.name} {short(part.frozen)} ({_source(part, origin)})"


def _source(part: Part, origin: str) -> str:
    if origin:
        return f"from {origin}"
    return f"from {shown(part.source)}" if part.source else "RANDOM"


def end(exp: Experiment, workdir: Path, metrics: Mapping[str, float]) -> list[str]:
    """What a finished run wrote, and the command that comes next."""
    run, step = shown(workdir), int(metrics["step"])
    # After an alignment stage, whose decoder is frozen, comes instruction tuning.
    decoder = [f"lm/layers/mlp/up/{name}" for name in ("kernel", *LORA)]
    if not any(re.search(exp.optim.trainable, path) for path in decoder):
        following = f"train --config=configs/stage2.py --workdir=DIR --config.init.from={run} --config.data.annotations=.."
        following += " --config.data.image_roots=.."
    else:
        following = (
            f"evaluate --config=configs/eval.py --workdir=DIR --config.eval.checkpoint={run}"
        )
        following += " --config.eval.benchmarks=.. --config.eval.annotations=.."
    return [
        f"{run} is finished: step {step}, loss {metrics['loss']:.4f}",
        f"  wrote    {run}/checkpoints/{step}, config.json, metrics.jsonl (every step), tensorboard, final.json",
        f"  next     python -m vlm_jax.{following}",
    ]


def asking(
    run: Experiment, checkpoint: str, step: int, workdir: Path, left: Mapping[str, tuple[int, int]]
) -> list[str]:
    """What an evaluation is about to do. left: name of a benchmark -> its questions, and those without an answer yet."""
    lm, vit = run.model.lm, run.model.vit
    asked = ", ".join(
        f"{name} ({total:,} questions{f', {total - missing:,} answered already' if missing < total else ''})"
        for name, (total, missing) in left.items()
    )
    return [
        f"  model    {shown(checkpoint)}, step {step}: images of {vit.image_px} px -> {run.model.compressor.name} -> decoder of "
        f"{lm.num_layers} layers, width {lm.width}",
        f"  asked    {asked}",
        f"  written  {shown(workdir)}/<benchmark>/predictions.jsonl, then scores.json and errors.csv; loading jax ...",
    ]


def asked(workdir: Path, scored: int) -> list[str]:
    """What an evaluation wrote, and the command that comes next."""
    folder = shown(workdir)
    if not scored:
        return [f"{folder}: answers are in <benchmark>/predictions.jsonl; nothing could be scored"]
    return [
        f"  wrote    {folder}/scores.json and errors.csv ({scored} row{'s' * (scored > 1)} of this run)",
        f"  next     python -m vlm_jax.laws.fit {folder}/errors.csv --out law.json, once it holds several LM sizes and "
        "numbers of visual tokens",
    ]


def short(count: float) -> str:
    """A number of parameters in three figures: 82.2k, 303M, 7.06B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def shown(path: str | Path) -> str:
    """A path as short as it can be typed here."""
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return absolute if inside.startswith("..") else inside
