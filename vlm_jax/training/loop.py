"""The training loop: batches put one ahead, checkpoints, metrics, resuming."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from vlm_jax import compressors, files, sharding
from vlm_jax.costs import chips
from vlm_jax.costs.flops import batch_flops
from vlm_jax.data import fingerprint, pipeline, tokenizer
from vlm_jax.hf.directory import is_model
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.settings.run import Experiment
from vlm_jax.storage import run as experiment
from vlm_jax.storage import weights
from vlm_jax.storage.checkpoint import Checkpoints
from vlm_jax.training import guard, optim, outline, telemetry
from vlm_jax.training.interrupt import Interrupt
from vlm_jax.training.step import (
    Plan,
    TrainState,
    fresh_state,
    from_saved,
    make_step,
    plan,
    to_saved,
)

log = logging.getLogger(__name__)


def run(exp: Experiment, workdir: Path, say: outline.Say = outline.silent) -> dict[str, float]:
    """Trains to the last step, from the newest checkpoint of `workdir` if there is one; the last step's metrics.

    say: is given the lines of the start and of the end, in the first process.

    Raises RunEnded when it was asked to stop (after saving a checkpoint), ConfigError for what the user must mend: another
    run in `workdir`, a full disk, a loss that is not finite.
    """
    sharding.start_processes(exp.train.peer_timeout)
    first = jax.process_index() == 0
    check_agreement(exp)
    visual_tokens = compressors.train_tokens(exp.model.compressor, exp.model.vit.grid)[0]
    check_fit(exp, visual_tokens)
    num_steps = exp.train.num_steps or max(
        int(exp.train.num_epochs * pipeline.steps_per_epoch(exp.data, visual_tokens)), 1
    )
    p = plan(exp, sharding.mesh_of(exp), num_steps)
    if exp.data.features_dir and "vit" in p.state.trainable:
        raise ConfigError(
            f"optim: trainable {exp.optim.trainable!r} takes parameters of the encoder, whose features come from a cache; "
            "freeze it, or set data.features_dir to ''."
        )
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(files.lock(workdir))
        shard = sharding.data_shard(p.mesh)
        data = pipeline.train_iterator(exp.data, visual_tokens, exp.model.vit, *shard)
        iterator = stack.enter_context(_closing(data))
        checkpoints = stack.enter_context(_closing(Checkpoints(workdir, exp.train.keep)))
        done = checkpoints.latest() or 0
        if not done:
            outline.check_frozen(exp, p.state.trainable, p.state.frozen)
        for line in _start_lines(p, visual_tokens, data.num_records, done) if first else ():
            say(line)
        if done:
            saved = checkpoints.restore(done, to_saved(p.state), iterator)
            state = from_saved(saved, exp.optim.trainable)
            if first and not fingerprint.is_known(workdir):
                fingerprint.write(exp.data, workdir)
            log.info("resumed %s at step %d of %d", workdir, done, num_steps)
        else:
            if first:
                experiment.write(exp, workdir)
                fingerprint.write(exp.data, workdir)
            state = begin(p)
        check_features(p, state)
        watch = guard.Guard(exp.train, workdir).notice
        metrics = stack.enter_context(_closing(telemetry.Metrics(workdir, done, first, watch)))
        display = stack.enter_context(_closing(telemetry.Display(num_steps, done, shows=first)))
        try:
            step = _loop(p, state, done, iterator, checkpoints, metrics, display)
        except jax.errors.JaxRuntimeError as error:
            raise _lost(error, workdir) from error
    if step < num_steps:
        raise RunEnded(
            f"asked to stop: {workdir} has a checkpoint of step {step} of {num_steps}; the same command goes on from there.",
            exit_code=0,
        )
    if first:
        experiment.finish(workdir, metrics.last)
        for line in outline.end(exp, workdir, metrics.last):
            say(line)
    return dict(metrics.last)


def check_agreement(exp: Experiment) -> None:
    """Raises ConfigError, in every process, when one of them reads other annotations than the first."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(fingerprint.digest(fingerprint.of(exp.data)), np.uint8)
    digests = multihost_utils.process_allgather(own)
    others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if others:
        raise ConfigError(
            f"data: annotations {', '.join(exp.data.annotations)}: process {others[0]} reads other content than process 0; "
            "give every machine the same files."
        )


def check_features(p: Plan, state: TrainState) -> None:
    """Raises ConfigError when the run reads cached features that are not those of its own encoder."""
    data = p.experiment.data
    if data.features_dir and data.max_images:
        weights.check_cached(data.features_dir, p.experiment.model, state.frozen["vit"])


def _start_lines(p: Plan, visual_tokens: int, num_records: int, done: int) -> list[str]:
    device = p.mesh.devices.flat[0]
    return outline.start(
        p.experiment, p.state.trainable, p.state.frozen, visual_tokens=visual_tokens, num_records=num_records,
        num_steps=p.num_steps, done=done, devices=f"{p.mesh.size} x {device.device_kind}",
    )  # fmt: skip


def begin(p: Plan) -> TrainState:
    """The state before step 1: the parts of `init` from where they are, random parameters for what is not there."""
    everything = optim.merge(p.state.trainable, p.state.frozen)
    init = p.experiment.init
    named = {
        part: source
        for part, source in init.sources.items()
        if getattr(init, part) or part in everything  # init.from supplies the parts that there are
    }
    return fresh_state(p, weights.load_by_part(named, p.experiment.model, everything))


def _lost(error: jax.errors.JaxRuntimeError, workdir: Path) -> Exception:
    """What a failure on the devices means: with other processes, most often that one of them is gone."""
    if jax.process_count() == 1:
        return error
    saved = experiment.last_step(workdir)
    return RunEnded(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on: {files.reason(error)} | If another process "
        f"ended first, its log says why. The same command in every process goes on from step {saved or 0}.",
        exit_code=1,
    )


@contextlib.contextmanager
def _closing(thing: Any) -> Generator[Any, None, None]:
    """Closes `thing` at the end. When an error is under way, what closing adds to it is told, but does not take its place."""
    try:
        yield thing
    except RunEnded:
        raise  # without the other processes a save under way would wait for them
    except BaseException:
        try:
            thing.close()
        except ConfigError as second:
            log.warning("also: %s", second)
        raise
    thing.close()


def _loop(
    p: Plan,
    state: TrainState,
    done: int,
    iterator: Any,
    checkpoints: Checkpoints,
    metrics: telemetry.Metrics,
    display: telemetry.Display,
) -> int:
    """The step it stopped at, whose checkpoint is being written: the last one, unless it was asked to stop before."""
    exp, last = p.experiment, p.num_steps
    step_function = make_step(p)
    peak = chips.peak_flops(p.mesh.devices.flat[0].device_kind)
    peak = peak and peak * p.mesh.size
    work, step = _work(p), done
    with sharding.use(p.mesh), Interrupt() as interrupt:
        host = next(iterator) if done < last else {}
        batch = sharding.put(host, p.mesh)
        while step < last:
            step += 1
            state, scalars = step_function(state, batch)
            told = {"bad_records": iterator.bad_records, "fill": iterator.fill}
            metrics.append(step, scalars | told, host["ids"])
            display.add(
                step, *work(host["tokens"].shape[1], bool({"images", "feature_last"} & host.keys()))
            )
            if interrupt.reached(step):
                last = step
            if step % exp.train.save_every == 0 or step == last:
                # First the metrics, then the checkpoint: a resumed metrics.jsonl has no gap, and a state after a loss that
                # is not finite is never saved without the guard's leave.
                metrics.flush(step)
                checkpoints.save(step, to_saved(state), iterator)
            if step == done + 1:
                metrics.flush(step)  # waits for the compilation, which the speed leaves out
                display.first(metrics.last)
            elif step % exp.train.log_every == 0 or step == last:
                # The step just sent keeps the device busy; only the ones before it are waited for.
                computed = step if step == last else step - 1
                metrics.flush(computed)
                if speed := display.speed(computed, peak):
                    metrics.board(computed, speed)
                    display.report(metrics.last, speed)
            # After the save, whose iterator must have handed out exactly `step` batches.
            if step < last:
                host = next(iterator)
                batch = sharding.put(host, p.mesh)
    if step_function._cache_size() > pipeline.num_shapes(exp.data):
        log.warning("the training step was compiled again: batches changed their shape")
    return step


def _work(p: Plan) -> Callable[[int, bool], tuple[int, float]]:
    """(slots per row, does the batch have images) -> tokens and FLOPs of a step of all processes together."""
    exp, learning = p.experiment, flatten_dict(p.state.trainable, sep="/").keys()

    @functools.cache
    def of(length: int, has_images: bool) -> tuple[int, float]:
        spent = batch_flops(exp, learning, length, has_images).total
        return exp.data.batch_size * length, spent

    return of


def check_fit(exp: Experiment, visual_tokens: int) -> None:
    """Raises ConfigError when the visual tokens leave no room for text, or the tokenizer knows more ids than the model."""
    needed = visual_tokens * exp.data.max_images
    if needed >= exp.data.max_tokens:
        raise ConfigError(
            f"data: {exp.data.max_images} x {visual_tokens} visual tokens leave no room in max_tokens "
            f"{exp.data.max_tokens}; raise max_tokens or compress more."
        )
    known = tokenizer.load(exp.data.tokenizer).vocab_size
    if known > exp.model.lm.vocab_size:
        its_own = exp.data.tokenizer if is_model(exp.data.tokenizer) else "DIR"
        raise ConfigError(
            f"model: lm vocab_size {exp.model.lm.vocab_size} is smaller than the tokenizer's {known}: the decoder does not "
            f"belong to the tokenizer {exp.data.tokenizer!r}. Name the one that does, --config.model.lm.preset={its_own} "
            f"--config.init.lm={its_own}; for a decoder that begins RANDOM and learns, set --config.model.lm.vocab_size={known}."
        )
