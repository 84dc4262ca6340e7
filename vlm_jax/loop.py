"""The training loop: state born sharded, one jitted and donated step, batches put one ahead, checkpoints, metrics."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import compressors, experiment, optim, sharding, telemetry, weights
from vlm_jax.checkpoint import Checkpoints
from vlm_jax.config import ConfigError
from vlm_jax.data import pipeline, tokenizer
from vlm_jax.experiment import Experiment
from vlm_jax.models.vlm import VLM, Inputs, init_params

log = logging.getLogger(__name__)

Tree = dict[str, Any]
Batch = Mapping[str, Array]

# For a function that runs once: on a CPU, optimising the initialisers takes three times as long as running them plain.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TrainState(NamedTuple):
    """What a step reads and replaces. Frozen parameters have no optimiser state."""

    step: Any  # int32 scalar: steps taken
    trainable: Tree
    frozen: Tree
    opt_state: Any


class Plan(NamedTuple):
    """All that is known before a number is computed: shapes, shardings, rules of the update."""

    experiment: Experiment
    mesh: Mesh
    num_steps: int
    optimizer: optax.GradientTransformation
    state: TrainState  # ShapeDtypeStructs with shardings


def plan(exp: Experiment, mesh: Mesh, num_steps: int) -> Plan:
    """Raises ConfigError when a mesh axis does not divide a parameter or the batch, or the regex matches nothing."""
    sharding.check_batch(exp.data.batch_size, mesh)
    boxed = weights.shapes(exp.model)
    params = weights.place(boxed, mesh)
    trainable, frozen = optim.partition(params, exp.optim.trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if leaf.dtype != jnp.float32:
            name = sharding.path_name(path)
            raise ConfigError(
                f"optim: {name} is trained, but stored as {leaf.dtype}, in which small updates vanish; set param_dtype to "
                "float32 or freeze it."
            )
    optimizer = optim.make_optimizer(
        exp.optim, num_steps, optim.partition(boxed, exp.optim.trainable)[0]
    )
    opt_state = jax.eval_shape(optimizer.init, trainable)
    like = sharding.shardings_like(opt_state, jax.tree.map(lambda x: x.sharding, trainable), mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    state = TrainState(step, trainable, frozen, jax.tree.map(_with_sharding, opt_state, like))
    return Plan(exp, mesh, num_steps, optimizer, state)


def _with_sharding(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def fresh_state(p: Plan) -> TrainState:
    """The parts of `init` from where they are, random parameters for the others, each made where it lives."""
    exp, state = p.experiment, p.state
    everything = optim.merge(state.trainable, state.frozen)
    params = weights.load_by_part(dataclasses.asdict(exp.init), exp.model, everything)
    fresh = {part: leaves for part, leaves in everything.items() if part not in params}

    def init(seed: Int[Array, ""]) -> Tree:
        random = nn.unbox(init_params(exp.model, jax.random.key(seed)))
        return {part: random[part] for part in fresh}

    on_cpu = p.mesh.devices.flat[0].platform == "cpu"
    options = QUICK_COMPILE if on_cpu else None
    if fresh:
        params |= jax.jit(init, out_shardings=_shardings(fresh), compiler_options=options)(
            exp.train.seed
        )
    trainable, frozen = optim.partition(params, exp.optim.trainable)
    opt_state = jax.jit(p.optimizer.init, out_shardings=_shardings(state.opt_state))(trainable)
    step = jax.device_put(jnp.int32(0), state.step.sharding)
    return TrainState(step, trainable, frozen, opt_state)


def to_saved(state: TrainState) -> Tree:
    """The layout of a checkpoint, in which the parameters are one tree again."""
    return {
        "step": state.step,
        "params": optim.merge(state.trainable, state.frozen),
        "opt_state": state.opt_state,
    }


def from_saved(saved: Tree, trainable: str) -> TrainState:
    return TrainState(
        saved["step"], *optim.partition(saved["params"], trainable), saved["opt_state"]
    )


def next_token_loss(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over the supervised targets of the whole batch, in float32; logits t-1 predict token t.

    Each target counts the same, on whichever device or in whichever row it is. Also: how many targets, how many hit.
    """
    targets, mask = tokens[:, 1:], loss_mask[:, 1:]
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    count = jnp.maximum(mask.sum(), 1)
    hits = (logits.argmax(axis=-1) == targets) & mask
    loss = jnp.where(mask, losses, 0.0).sum() / count
    return loss, {"tokens": mask.sum(), "accuracy": hits.sum() / count}


def make_loss(exp: Experiment) -> Callable[[Tree, Batch, Array], tuple[Array, dict[str, Array]]]:
    """(parameters, batch, step) -> loss and scalars.

    An elastic compressor either shows as many visual tokens as this step draws, or the loss is the mean over all numbers
    that it is trained for: encoder, compressor and projector run once, the decoder once per number, one after the other,
    and nothing of its passes is kept for the backward pass but their inputs.
    """
    config = compressors.for_training(exp.model)
    model, elastic = VLM(config), compressors.get(config.compressor.name).elastic
    counts = compressors.train_tokens(exp.model.compressor, config.vit.grid)

    def plain(params: Tree, batch: Batch, step: Array) -> tuple[Array, dict[str, Array]]:
        logits: Any = model.apply({"params": params}, Inputs.from_batch(batch))
        return next_token_loss(logits, batch["tokens"], batch["loss_mask"])

    def drawn(params: Tree, batch: Batch, step: Array) -> tuple[Array, dict[str, Array]]:
        # Differs from MQT-LLaVA: every process and micro-batch draws the same number, from the seed and the step alone.
        key = jax.random.fold_in(jax.random.key(exp.train.seed), step)
        count = jax.random.choice(key, jnp.array(counts))
        loss, scalars = plain(params, {**batch, "count": count}, step)
        return loss, scalars | {"visual_tokens": count}

    def averaged(params: Tree, batch: Batch, step: Array) -> tuple[Array, dict[str, Array]]:
        inputs = Inputs.from_batch(batch)
        visual: Any = model.apply({"params": params}, inputs, method="see")
        if visual is None:
            return plain(params, batch, step)

        # With the passes kept, four scales of a small model took 4.5 times the memory and 1.4 times the CPU time.
        @jax.checkpoint
        def shown(count: Array) -> tuple[Array, dict[str, Array]]:
            assert elastic is not None  # else the decoder runs once
            part = elastic.show(visual.tokens, count)
            logits: Any = model.apply({"params": params}, inputs, part, method="read")
            return next_token_loss(logits, batch["tokens"], batch["loss_mask"])

        return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(shown, jnp.array(counts)))

    if compressors.decoder_passes(exp.model) > 1:
        return averaged
    return drawn if len(counts) > 1 else plain


def make_step(p: Plan) -> Any:
    """The jitted step, (state, batch) -> (new state, scalars). It consumes the state it is given (donated); the new one has the same shardings.

    Gradients are taken of the trainable parameters alone: nothing is kept or computed backwards for frozen parts below
    the first trainable one (with a frozen encoder: the encoder has no backward pass).
    """
    loss_of_batch = make_loss(p.experiment)
    rate = optim.schedule(
        p.experiment.optim.learning_rate, p.num_steps, p.experiment.optim.warmup_ratio
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        def loss_of(trainable: Tree) -> tuple[Array, dict[str, Array]]:
            return loss_of_batch(optim.merge(trainable, state.frozen), batch, state.step)

        (loss, scalars), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable)
        updates, opt_state = p.optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        scalars = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "lr": rate(state.step),
        } | scalars
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), scalars

    out = (_shardings(p.state), sharding.replicated(p.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def run(exp: Experiment, workdir: Path) -> dict[str, float]:
    """Trains to the last step, from the newest checkpoint of `workdir` if there is one; the last step's metrics."""
    sharding.start_processes()
    visual_tokens = compressors.train_tokens(exp.model.compressor, exp.model.vit.grid)[0]
    check_fit(exp, visual_tokens)
    num_steps = exp.train.num_steps or max(
        int(exp.train.num_epochs * pipeline.steps_per_epoch(exp.data)), 1
    )
    p = plan(exp, sharding.make_mesh(exp.mesh), num_steps)
    iterator = pipeline.train_iterator(
        exp.data,
        visual_tokens,
        exp.model.vit,
        jax.process_index(),
        jax.process_count(),
    )
    checkpoints = Checkpoints(workdir, exp.train.keep)
    done = checkpoints.latest() or 0
    if done:
        state = from_saved(
            checkpoints.restore(done, to_saved(p.state), iterator), exp.optim.trainable
        )
        log.info("resumed %s at step %d of %d", workdir, done, num_steps)
    else:
        if jax.process_index() == 0:
            experiment.write(exp, workdir)
        state = fresh_state(p)
    metrics = telemetry.Metrics(workdir, done, writes=jax.process_index() == 0)
    display = telemetry.Display(num_steps, done, shows=jax.process_index() == 0)
    try:
        final = _loop(p, state, done, iterator, checkpoints, metrics, display)
    finally:
        display.close()
        metrics.close()
        checkpoints.close()
        iterator.close()
    if jax.process_index() == 0:
        experiment.finish(workdir, final)
    return final


def _loop(
    p: Plan,
    state: TrainState,
    done: int,
    iterator: Any,
    checkpoints: Checkpoints,
    metrics: telemetry.Metrics,
    display: telemetry.Display,
) -> dict[str, float]:
    exp, last = p.experiment, p.num_steps
    step_function = make_step(p)
    peak = telemetry.peak_flops(p.mesh.devices.flat[0].device_kind)
    peak = peak and peak * p.mesh.size
    rows, length = exp.data.batch_size, exp.data.max_tokens
    encoded = 0 if exp.data.features_dir else rows * exp.data.max_images
    decoded = rows * compressors.decoder_passes(exp.model)
    flops = telemetry.step_flops(exp.model, decoded, length, encoded, set(p.state.trainable))
    with sharding.use(p.mesh):
        batch = sharding.put(next(iterator), p.mesh) if done < last else {}
        for step in range(done + 1, last + 1):
            state, scalars = step_function(state, batch)
            metrics.append(step, scalars | {"bad_records": iterator.bad_records})
            if step % exp.train.save_every == 0 or step == last:
                # First the metrics, then the checkpoint: a resumed metrics.jsonl has no gap.
                metrics.flush(step)
                checkpoints.save(step, to_saved(state), iterator)
            if step == done + 1:
                metrics.flush(step)  # waits for the compilation, which the speed leaves out
                display.speed(step, 0, 0, None)
            elif step % exp.train.log_every == 0 or step == last:
                # The step just sent keeps the device busy; only the ones before it are waited for.
                computed = step if step == last else step - 1
                metrics.flush(computed)
                speed = display.speed(computed, rows * length, flops, peak)
                metrics.board(computed, speed)
                display.report(metrics.last, speed)
            # After the save, whose iterator must have handed out exactly `step` batches.
            if step < last:
                batch = sharding.put(next(iterator), p.mesh)
    if step_function._cache_size() > 1:
        log.warning("the training step was compiled again: batches changed their shape")
    return dict(metrics.last)


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
        raise ConfigError(
            f"model: lm vocab_size {exp.model.lm.vocab_size} is smaller than the tokenizer's {known}; "
            f"set --config.model.lm.vocab_size={known}."
        )
