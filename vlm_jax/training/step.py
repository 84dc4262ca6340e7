"""One training step: its plan (shapes and shardings), the initial state, and the jitted update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
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

# For functions that run once: on a CPU, optimising the initialisers takes three times as long as running them unoptimised.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TrainState(NamedTuple):
    """The input and output of a step. Only trainable parameters have an optimiser state."""

    step: Any  # int32 scalar: the number of steps taken
    trainable: Tree
    frozen: Tree
    opt_state: Any


class TrainPlan(NamedTuple):
    """What is known before anything is computed: shapes, shardings and the optimiser."""

    experiment: Experiment
    mesh: Mesh
    num_steps: int
    optimizer: optax.GradientTransformation
    state: TrainState  # ShapeDtypeStructs with shardings


def plan(exp: Experiment, mesh: Mesh, num_steps: int) -> TrainPlan:
    """Raises ConfigError when a mesh axis does not divide a parameter or the batch, when `optim.trainable` matches no
    parameter, or when a parameter to be trained is not stored in float32.
    """
    sharding.check_batch(exp.data.batch_size, mesh, exp.train.micro_batches)
    boxed = shapes(exp.model)
    params = sharding.sharded_shapes(boxed, mesh)
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
    """The state before step 1: the parameters in `loaded`, and random ones, created sharded, for all others."""
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
        if exp.model.projector_scale == "words":
            params |= _at_word_scale(params, fresh)
    trainable, frozen = optim.partition(unflatten_dict(params, sep="/"), exp.optim.trainable)
    opt_state = jax.jit(p.optimizer.init, out_shardings=_shardings(state.opt_state))(trainable)
    step = jax.device_put(jnp.int32(0), state.step.sharding)
    return TrainState(step, trainable, frozen, opt_state)


def _at_word_scale(params: Tree, fresh: Tree) -> Tree:
    """The projector's fresh norm and positions times the root mean square of the word embeddings; flat paths.

    An RMSNorm's tokens begin at 1, twenty times the scale of a trained word table. Adam moves both by the same absolute
    steps, so visual tokens would learn that much more slowly than words, relative to their size.
    """
    scaled = {
        path: fresh[path]
        for path in ("projector/norm/scale", "projector/position")
        if path in fresh
    }

    def scale(words: Array, one: Tree) -> Tree:
        rms = jnp.sqrt(jnp.mean(jnp.square(words.astype(jnp.float32))))
        return {path: x * rms for path, x in one.items()}

    begun = {path: params[path] for path in scaled}
    return jax.jit(scale, out_shardings=_shardings(scaled))(params["lm/embed"], begun)


def to_saved(state: TrainState) -> Tree:
    """The state as a checkpoint stores it, with trainable and frozen parameters in one tree."""
    return {
        "step": state.step,
        "params": optim.merge(state.trainable, state.frozen),
        "opt_state": state.opt_state,
    }


def from_saved(saved: Tree, trainable: str) -> TrainState:
    return TrainState(
        saved["step"], *optim.partition(saved["params"], trainable), saved["opt_state"]
    )


def leave_out(saved: Tree, names: Collection[str]) -> Tree:
    """A saved state without these parameters, which storage/frozen.py finds elsewhere."""
    kept = {n: x for n, x in flatten_dict(saved["params"], sep="/").items() if n not in names}
    return {**saved, "params": unflatten_dict(kept, sep="/")}


def put_in(saved: Tree, loaded: Tree) -> Tree:
    """The inverse: a saved state with the parameters of `loaded` in it."""
    every = flatten_dict(saved["params"], sep="/") | flatten_dict(loaded, sep="/")
    return {**saved, "params": unflatten_dict(every, sep="/")}


def attention_kernel(exp: Experiment, flash: str) -> str:
    """The decoder's kernel in training. model.lm.attention "auto" is the devices' flash kernel where that is equivalent.

    Flash kernels take no dense mask. splash separates samples, padding and empty visual slots by segments; cudnn is causal
    only, so it is used for rows in which nothing but padding at the end must be masked. Raises ConfigError when the config
    asks for a kernel that cannot be used.
    """
    asked, lm = exp.model.lm.attention, exp.model.lm
    compressor = exp.model.compressor
    reasons = {
        f"data.turns is {exp.data.turns}": exp.data.turns != "dialogue",
        f"its sliding_window {lm.sliding_window} is shorter than a row": 0
        < lm.sliding_window
        < exp.data.max_tokens,
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


def make_gradients(p: TrainPlan) -> Callable[[Tree, Batch, Array, Tree], tuple[Scored, Tree]]:
    """(trainable, batch, step, frozen) -> ((loss, scalars), gradients of the trainable parameters), of the whole batch.

    Micro-batches are computed in turn and weighted by their numbers of targets, so the result equals that of the whole batch
    up to the order of sums. They take every n-th row, so that each device's rows stay on the device.
    """
    exp, parts = p.experiment, p.experiment.train.micro_batches
    kernel = attention_kernel(exp, flash_kernel(p.mesh.devices.flat[0]))
    of_batch = jax.value_and_grad(make_loss(exp, kernel), has_aux=True)
    if parts == 1:
        return of_batch

    def summed(trainable: Tree, batch: Batch, step: Array, frozen: Tree) -> tuple[Scored, Tree]:
        count = jnp.maximum(batch["loss_mask"][:, 1:].sum(), 1)

        def weighted(part: Batch) -> tuple[Scored, Tree]:
            (loss, scalars), grads = of_batch(trainable, part, step, frozen)
            share = scalars["tokens"] / count
            (loss, scaled), grads = jax.tree.map(lambda x: x * share, ((loss, scalars), grads))
            return (loss, scaled | {"tokens": scalars["tokens"]}), grads

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            rows = {k: constrain(x, "batch", *(None,) * (x.ndim - 1)) for k, x in part.items()}
            return jax.tree.map(jnp.add, total, weighted(rows)), None

        micro_batched = {
            k: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()
        }
        scored, _ = jax.eval_shape(weighted, jax.tree.map(lambda x: x[0], micro_batched))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scored)
        grads = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), p.state.trainable
        )
        return jax.lax.scan(add, (zeros, grads), micro_batched)[0]

    return summed


def make_step(p: TrainPlan) -> Any:
    """The jitted step, (state, batch) -> (new state, scalars). The given state is donated; shardings stay the same.

    Gradients are taken with respect to the trainable parameters only, so frozen modules before the first trainable one have
    no backward pass (a frozen encoder, for example).
    """
    gradients = make_gradients(p)
    config = p.experiment.optim
    rate = optim.rate(config, config.learning_rate, p.num_steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        (loss, scalars), grads = gradients(state.trainable, batch, state.step, state.frozen)
        updates, opt_state = p.optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        grad_norm = optax.tree.norm(grads)
        ok = guard.is_finite(loss, grad_norm)
        trainable, opt_state = guard.keep_finite(
            ok, (trainable, opt_state), (state.trainable, state.opt_state)
        )
        metrics: dict[str, Any] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate(state.step),
            "skipped": ~ok,
        } | scalars
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    out = (_shardings(p.state), sharding.replicated(p.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)
