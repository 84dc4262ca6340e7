"""The lines that a training command prints at its start and its end: what it is going to do, and what it wrote. No jax."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlm_jax import files
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LORA
from vlm_jax.settings.presets import size_name
from vlm_jax.settings.run import Experiment

Tree = Mapping[str, Any]  # parameters, or what has their shapes, as nested dicts


class Part(NamedTuple):
    """A top-level part of the model: how many parameters are trained and frozen, and their source ("": random)."""

    name: str
    trained: int
    frozen: int
    source: str


def parts(exp: Experiment, trainable: Tree, frozen: Tree) -> list[Part]:
    """The parts of the model that have parameters, in the order in which an image passes through them."""
    found = []
    for name, source in exp.init.sources.items():
        learns, stays = (
            sum(size for _, size in _sizes(tree.get(name, {}))) for tree in (trainable, frozen)
        )
        if learns or stays:
            found.append(Part(name, learns, stays, source))
    return found


def check_frozen(exp: Experiment, trainable: Tree, frozen: Tree) -> None:
    """Raises ConfigError when frozen parameters would be random, unless train.random_frozen allows it.

    Frozen adapters are allowed, because new ones change nothing. Of a run on text alone only the decoder is checked.
    """
    if exp.train.random_frozen:
        return
    used = ("lm",) if exp.data.max_images == 0 else tuple(exp.init.sources)
    names = {
        part.name: f"{part.name} ({size_name(part.frozen)} parameters)"
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


def opening(num_files: int, workdir: str | Path, done: int | None) -> str:
    """The first line, printed before anything slow. done: the last step of a run to resume."""
    state = f"goes on after step {done}" if done else "a new run"
    return f"{files.shown(workdir)}: {state}; loading jax and opening {num_files} annotation file{'s' * (num_files > 1)} ..."


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
    """The lines printed once all sizes are known, before weights are read and the step is compiled."""
    data, vit, lm = exp.data, exp.model.vit, exp.model.lm
    names = ", ".join(files.shown(path) for path in data.annotations)
    roots = (
        ", ".join(files.shown(root) for root in dict.fromkeys(data.image_roots) if root) or "none"
    )
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
        f"template {data.template}, tokenizer {files.shown(data.tokenizer)}",
        f"  trained  {learning}",
        f"  frozen   {still or 'nothing'}",
        f"  steps    {num_steps:,} of {data.batch_size} {rows}"
        + ("" if data.packing else f" = {drawn:.3g} epochs")
        + f" on {devices}; {exp.optim.optimizer}, rate {exp.optim.learning_rate:g}; compiling the first step ...",
    ]


def _trained(part: Part, origin: str) -> str:
    total = part.trained + part.frozen
    size = size_name(part.trained) + (f" of {size_name(total)}" if part.frozen else "")
    return f"{part.name} {size} ({_source(part, origin)})"


def _frozen(part: Part, origin: str) -> str:
    return f"{part.name} {size_name(part.frozen)} ({_source(part, origin)})"


def _source(part: Part, origin: str) -> str:
    if origin:
        return f"from {origin}"
    return f"from {files.shown(part.source)}" if part.source else "RANDOM"


def end(exp: Experiment, workdir: Path, metrics: Mapping[str, float]) -> list[str]:
    """The lines about what a finished run wrote, and the next command to give."""
    run, step = files.shown(workdir), int(metrics["step"])
    # A frozen decoder means an alignment stage; instruction tuning follows it.
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
