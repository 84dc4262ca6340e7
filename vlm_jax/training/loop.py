"""The training loop: prefetching, checkpoints, metrics, resuming."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from vlm_jax import compressors, files, sharding
from vlm_jax.costs import chips
from vlm_jax.costs.flops import batch_flops
from vlm_jax.data import fingerprint, pipeline, tokenizer
from vlm_jax.files import Path
from vlm_jax.hf.directory import is_model
from vlm_jax.models import adapters
from vlm_jax.progress import Say, silent
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.settings.run import Experiment
from vlm_jax.storage import checksums, frozen, weights
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import Checkpoints, cannot_go_on, saved_names
from vlm_jax.training import guard, optim, outline, telemetry, validation
from vlm_jax.training.interrupt import Interrupt
from vlm_jax.training.step import (
    TrainPlan,
    TrainState,
    fresh_state,
    from_saved,
    leave_out,
    make_step,
    plan,
    put_in,
    to_saved,
)

log = logging.getLogger(__name__)


def run(exp: Experiment, workdir: Path, say: Say = silent) -> dict[str, float]:
    """Trains to the last step, starting from the newest checkpoint in `workdir`; returns the metrics of the last step.

    say: in the first process, is called with each line that reports the start and the end.

    Raises RunEnded after a request to stop (a checkpoint is saved first) and ConfigError for problems the user must fix:
    another run in `workdir`, a full disk, a loss that is not finite.
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
    check_encoder_is_frozen(p)
    with contextlib.ExitStack() as stack:
        still_ours = stack.enter_context(files.lock(workdir)) if first else _nothing
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
            elsewhere = frozen.read(workdir)
            state = resume(p, workdir, done, checkpoints, iterator, elsewhere)
            left_out = set() if exp.train.save_frozen else set(elsewhere)
            if first and not fingerprint.is_known(workdir):
                fingerprint.write(exp.data, workdir)
            log.info("resumed %s at step %d of %d", workdir, done, num_steps)
        else:
            if first:
                experiment.write(exp, workdir)
                fingerprint.write(exp.data, workdir)
            state = begin(p)
            left_out = set() if exp.train.save_frozen else record_frozen(p, state, workdir, first)
        check_features(p, state)
        watch = guard.Guard(exp.train, workdir).notice
        metrics = stack.enter_context(
            _closing(telemetry.Metrics(workdir, done, first, watch, still_ours))
        )
        display = stack.enter_context(_closing(telemetry.Display(num_steps, done, shows=first)))
        held = validation.Validation(p, visual_tokens, workdir) if exp.train.validation else None
        try:
            step = _loop(p, state, done, iterator, checkpoints, metrics, display, held, left_out)
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


def _nothing() -> None:
    """Stands for the check of the lock in processes that hold none."""


def check_agreement(exp: Experiment) -> None:
    """Raises ConfigError, in every process, when the annotations of a process differ from those of process 0."""
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


def check_encoder_is_frozen(p: TrainPlan) -> None:
    """Raises ConfigError when the run trains an encoder whose features come from a cache."""
    exp = p.experiment
    if exp.data.features_dir and "vit" in p.state.trainable:
        raise ConfigError(
            f"optim: trainable {exp.optim.trainable!r} takes parameters of the encoder, whose features come from a cache; "
            "freeze it, or set data.features_dir to ''."
        )


def check_features(p: TrainPlan, state: TrainState) -> None:
    """Raises ConfigError when the cached features were not made by this run's encoder."""
    data = p.experiment.data
    if data.features_dir and data.max_images:
        weights.check_cached(data.features_dir, p.experiment.model, state.frozen["vit"])


def _start_lines(p: TrainPlan, visual_tokens: int, num_records: int, done: int) -> list[str]:
    device = p.mesh.devices.flat[0]
    return outline.start(
        p.experiment, p.state.trainable, p.state.frozen, visual_tokens=visual_tokens, num_records=num_records,
        num_steps=p.num_steps, done=done, devices=f"{p.mesh.size} x {device.device_kind}",
    )  # fmt: skip


def begin(p: TrainPlan) -> TrainState:
    """The state before step 1: parts that `init` names are loaded, all other parameters are random."""
    everything = optim.merge(p.state.trainable, p.state.frozen)
    return fresh_state(p, weights.load_by_part(_named(p), p.experiment.model, everything))


def _named(p: TrainPlan) -> dict[str, str]:
    """Part -> where `init` says that it comes from; init.from supplies only parts that the model has."""
    init, has = p.experiment.init, p.state.trainable.keys() | p.state.frozen.keys()
    return {part: s for part, s in init.sources.items() if getattr(init, part) or part in has}


def record_frozen(p: TrainPlan, state: TrainState, workdir: Path, first: bool) -> set[str]:
    """Notes where the frozen parameters came from, and returns the paths of those that checkpoints can leave out."""
    named = {part: source for part, source in _named(p).items() if source}
    # Adapters are new, unless the run that supplies the decoder had the same.
    loaded = {part: state.frozen[part] for part in named if part in state.frozen}
    if "lm" in loaded:
        loaded["lm"] = adapters.without(loaded["lm"])
    return frozen.record(workdir, named, checksums.of(loaded), first)


def resume(
    p: TrainPlan,
    workdir: Path,
    step: int,
    checkpoints: Checkpoints,
    iterator: Any,
    elsewhere: Mapping[str, frozen.Leaf],
) -> TrainState:
    """The state of a checkpoint, with what it leaves out from where that is. Raises ConfigError as both do."""
    wanted = to_saved(p.state)
    held = saved_names(workdir, step) if elsewhere else ()
    missing = {name: leaf for name, leaf in elsewhere.items() if name not in held}
    saved = checkpoints.restore(step, leave_out(wanted, missing), iterator)
    others = weights.load_frozen(str(workdir), p.experiment.model, wanted["params"], missing)
    return from_saved(put_in(saved, others), p.experiment.optim.trainable)


def _lost(error: jax.errors.JaxRuntimeError, workdir: Path) -> Exception:
    """The error to report for a device failure; with several processes, usually another process has ended."""
    if jax.process_count() == 1:
        return error
    return cannot_go_on(files.reason(error), experiment.last_step(workdir))


@contextlib.contextmanager
def _closing(thing: Any) -> Generator[Any, None, None]:
    """Closes `thing` at the end. An error in closing does not replace one that is already being raised: it is logged.

    A RunEnded in closing makes a ConfigError that is being raised a RunEnded: an exit would wait for what is gone.
    """
    try:
        yield thing
    except RunEnded:
        raise  # closing would wait for a save that needs the other processes
    except BaseException as first:
        try:
            thing.close()
        except (ConfigError, RunEnded) as second:
            log.warning("also: %s", second)
            if isinstance(second, RunEnded) and isinstance(first, ConfigError):
                raise RunEnded(str(first), exit_code=2) from first
        raise
    thing.close()


def _loop(
    p: TrainPlan,
    state: TrainState,
    done: int,
    iterator: Any,
    checkpoints: Checkpoints,
    metrics: telemetry.Metrics,
    display: telemetry.Display,
    held: validation.Validation | None = None,
    left_out: Collection[str] = (),
) -> int:
    """Runs the remaining steps and returns the last one taken: the final step, or an earlier one after a request to stop.

    A checkpoint of it is being written when this returns.
    """
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
            # One step, dispatched without waiting for its result.
            state, scalars = step_function(state, batch)
            counts = {"bad_records": iterator.bad_records, "fill": iterator.fill}
            if held and held.is_due(step):
                counts[validation.LOSS] = display.held_out = held.loss(state)
                held.keep(step, state, counts[validation.LOSS])
            metrics.append(step, scalars | counts, host["ids"])
            display.add(step, *work(host))
            if interrupt.reached(step):
                last = step

            # Every save_every steps: a checkpoint.
            if step % exp.train.save_every == 0 or step == last:
                # The metrics come before the checkpoint, so that a resumed metrics.jsonl has no gap and the guard can stop the
                # run before it saves a state whose loss was not finite.
                metrics.flush(step)
                checkpoints.save(step, leave_out(to_saved(state), left_out), iterator)

            # Every log_every steps: metrics and speed.
            if step == done + 1:
                metrics.flush(step)  # waits for the compilation, which the speed does not count
                display.first(metrics.last)
            elif step % exp.train.log_every == 0 or step == last:
                # Waits for the previous step only, so that the device is busy with this one meanwhile.
                computed = step if step == last else step - 1
                metrics.flush(computed)
                if speed := display.speed(computed, peak):
                    metrics.board(computed, speed)
                    display.report(metrics.last, speed)

            # The next batch, which the step above overlaps with. It is taken after the save, because a checkpoint of step n
            # stores an iterator that has returned n batches.
            if step < last:
                host = next(iterator)
                batch = sharding.put(host, p.mesh)
    if step_function._cache_size() > pipeline.num_shapes(exp.data):
        log.warning("the training step was compiled again: batches changed their shape")
    return step


def _work(p: TrainPlan) -> Callable[[Mapping[str, Any]], tuple[int, float]]:
    """This process's part of a batch -> tokens and FLOPs of the step, over all processes, whose parts are taken to be alike."""
    exp, learning = p.experiment, flatten_dict(p.state.trainable, sep="/").keys()

    @functools.cache
    def spent(length: int, has_images: bool, supervised: int) -> int:
        return batch_flops(exp, learning, length, has_images, supervised).total

    def of(host: Mapping[str, Any]) -> tuple[int, float]:
        rows, length = host["tokens"].shape
        kind = length, bool({"images", "feature_last"} & host.keys())
        supervised = host["loss_mask"][:, 1:].sum() * exp.data.batch_size / rows
        without = spent(*kind, 0)
        return exp.data.batch_size * length, without + supervised * (spent(*kind, 1) - without)

    return of


def check_fit(exp: Experiment, visual_tokens: int) -> None:
    """Raises ConfigError when visual tokens leave no room for text or the tokenizer has more ids than the decoder."""
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
