"""One training step: what is known before a number is computed, a state that is born sharded, the jitted and donated update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Int

from vlm_jax import sharding
from vlm_jax.layers import constrain
from vlm_jax.models import adapters
from vlm_jax.models.attention import flash_kernel
from vlm_jax.models.vlm import init_params, shapes
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import Experiment
from vlm_jax.training import guard, optim
from vlm_jax.training.losses import Batch, Scored, Tree, make_loss

log = logging.getLogger(__name__)

# For a function that runs once: on a CPU, optimising the initialisers takes three times as long as running them plain.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TrainState(NamedTuple):
    """What a step reads and replaces. Frozen parameters have no optimiser state."""

    step: Any  # int32 scalar: steps taken
    trainable: Tree
    frozen: Tree
    opt_state: Any


class TrainPlan(NamedTuple):
    """All that is known before a number is computed: shapes, shardings, rules of the update."""

    experiment: Experiment
    mesh: Mesh
    num_steps: int
    optimizer: optax.GradientTransformation
    state: TrainState  # ShapeDtypeStructs with shardings


def plan(exp: Experiment, mesh: Mesh, num_steps: int) -> TrainPlan:
    """Raises ConfigError when a mesh axis does not divide a parameter or the batch, or the regex matches nothing."""
    sharding.check_batch(exp.data.batch_size, mesh, exp.train.micro_batches)
    boxed = shapes(exp.model)
    params = sharding.place(boxed, mesh)
    trainable, frozen = optim.partition(params, exp.optim.trainable)
    adapters.check_trainable(params, trainable)
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
    like = sharding.shardings_like(opt_state, trainable, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    state = TrainState(step, trainable, frozen, jax.tree.map(_with_sharding, opt_state, like))
    return TrainPlan(exp, mesh, num_steps, optimizer, state)


def _with_sharding(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def fresh_state(p: TrainPlan, loaded: Tree | None = None) -> TrainState:
    """The state before step 1: the parameters of `loaded`, random ones for the others, each made where it lives."""
    exp, state = p.experiment, p.state
    everything = optim.merge(state.trainable, state.frozen)
    params, wanted = (flatten_dict(tree or {}, sep="/") for tree in (loaded, everything))
    fresh = {path: leaf for path, leaf in wanted.items() if path not in params}

    def init(seed: Int[Array, ""]) -> Tree:
        random = flatten_dict(nn.unbox(init_params(exp.model, jax.random.key(seed))), sep="/")
        return {path: random[path] for path in fresh}

    options = QUICK_COMPILE if p.mesh.devices.flat[0].platform == "cpu" else None
    if fresh:
        params |= jax.jit(init, out_shardings=_shardings(fresh), compiler_options=options)(
            exp.train.seed
        )
    trainable, frozen = optim.partition(unflatten_dict(params, sep="/"), exp.optim.trainable)
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


def attention_kernel(exp: Experiment, flash: str) -> str:
    """The decoder's kernel in training: model.lm.attention, or the devices' flash kernel where it computes the same.

    A flash kernel never sees a mask. splash can tell samples, padding and hidden visual slots apart (segments); cudnn is
    used where causality alone hides all that must be hidden: in rows that are real up to their padding. Raises
    ConfigError when the config asks for a kernel that cannot.
    """
    asked, lm = exp.model.lm.attention, exp.model.lm
    compressor = exp.model.compressor
    reasons = {
        f"data.turns is {exp.data.turns}": exp.data.turns != "dialogue",
        f"its sliding_window {lm.sliding_window} is shorter than a row": 0
        < lm.sliding_window
        < exp.data.max_tokens,
        "mesh.sequence cuts rows": exp.mesh.sequence != 1,
    }
    if "cudnn" in (asked, flash):
        reasons |= {
            "data.packing puts several samples into a row": exp.data.packing,
            f"compressor {compressor.name} hides visual slots": compressor.elastic
            or compressor.uses_scores,
            f"model.lm.dtype is {lm.dtype}": lm.dtype == "float32",
            f"head_dim {lm.head_dim} is no multiple of 8 up to 128": lm.head_dim % 8
            or lm.head_dim > 128,
        }
    found = [reason for reason, applies in reasons.items() if applies]
    if asked == "auto":
        return "xla" if found else flash
    if asked != "xla" and (found or asked != flash):
        why = found[0] if found else "these devices do not have it"
        raise ConfigError(
            f"model: lm attention {asked!r} cannot be used: {why}; use 'auto' or 'xla'."
        )
    return asked


def make_gradients(p: TrainPlan) -> Callable[[TrainState, Batch], tuple[Scored, Tree]]:
    """(state, batch) -> ((loss, scalars), gradients of the trainable parameters), of the whole batch.

    Micro-batches are computed one after the other. Each weighs as many targets as it has, so the result is the whole
    batch's, but for the order of sums. Rows are dealt out in turn: each device's rows stay where they are.
    """
    exp = p.experiment
    loss_of_batch, parts = (
        make_loss(exp, attention_kernel(exp, flash_kernel(p.mesh.devices.flat[0]))),
        exp.train.micro_batches,
    )

    def whole(state: TrainState, batch: Batch) -> tuple[Scored, Tree]:
        def loss_of(trainable: Tree) -> Scored:
            return loss_of_batch(optim.merge(trainable, state.frozen), batch, state.step)

        return jax.value_and_grad(loss_of, has_aux=True)(state.trainable)

    def summed(state: TrainState, batch: Batch) -> tuple[Scored, Tree]:
        count = jnp.maximum(batch["loss_mask"][:, 1:].sum(), 1)

        def weighted(part: Batch) -> tuple[Scored, Tree]:
            (loss, scalars), grads = whole(state, part)
            share = scalars["tokens"] / count
            (loss, scaled), grads = jax.tree.map(lambda x: x * share, ((loss, scalars), grads))
            return (loss, scaled | {"tokens": scalars["tokens"]}), grads

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            rows = {k: constrain(x, "batch", *(None,) * (x.ndim - 1)) for k, x in part.items()}
            return jax.tree.map(jnp.add, total, weighted(rows)), None

        dealt = {k: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}
        scored, _ = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], dealt))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scored)
        grads = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), p.state.trainable
        )
        return jax.lax.scan(add, (zeros, grads), dealt)[0]

    return whole if parts == 1 else summed


def make_step(p: TrainPlan) -> Any:
    """The jitted step, (state, batch) -> (new state, scalars). It consumes the state it is given (donated); the new one has the same shardings.

    Gradients are taken of the trainable parameters alone: nothing is kept or computed backwards for frozen parts below
    the first trainable one (with a frozen encoder: the encoder has no backward pass).
    """
    gradients = make_gradients(p)
    rate = optim.schedule(
        p.experiment.optim.learning_rate, p.num_steps, p.experiment.optim.warmup_ratio
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        (loss, scalars), grads = gradients(state, batch)
        updates, opt_state = p.optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        grad_norm = optax.tree.norm(grads)
        ok = guard.is_finite(loss, grad_norm)
        trainable, opt_state = guard.keep_finite(
            ok, (trainable, opt_state), (state.trainable, state.opt_state)
        )
        told: dict[str, Any] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate(state.step),
            "skipped": ~ok,
        } | scalars
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), told

    out = (_shardings(p.state), sharding.replicated(p.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)
