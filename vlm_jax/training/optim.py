"""The optimiser: which parameters train (a regex on paths), the update rule, and the learning rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LORA
from vlm_jax.settings.run import OptimConfig

Tree = dict[str, Any]


def partition(params: Tree, trainable: str, setting: str = "trainable") -> tuple[Tree, Tree]:
    """Splits nested `params` into (trainable, frozen). A path such as "lm/embed" is trainable if the regex matches in it.

    Both results are nested like `params`; `merge` is the inverse. Leaves may be boxed or abstract. Raises ConfigError when
    the regex is malformed or matches nothing; `setting` is the field of `optim` that holds it.
    """
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise ConfigError(
            f"optim: {setting} {trainable!r} is not a regular expression: {error}."
        ) from error
    flat = flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if pattern.search(path)}
    if not chosen:
        raise ConfigError(
            f"optim: {setting} {trainable!r} matches no parameter; paths begin with "
            f"{', '.join(f'{name}/' for name in sorted(params))}."
        )
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    flat = flatten_dict(trainable, sep="/") | flatten_dict(frozen, sep="/")
    return unflatten_dict(flat, sep="/")


def schedule(
    peak: float, num_steps: int, warmup_ratio: float, decay_ratio: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to `peak` over ceil(warmup_ratio * num_steps) steps, then down to 0 at `num_steps`.

    decay_ratio 0: a half cosine, equal to transformers' `get_cosine_schedule_with_warmup`, which LLaVA uses. Above 0: constant,
    then linear to 0 over that last share of the steps. The first step of a warm-up has rate 0.
    """
    warmup = -int(-warmup_ratio * num_steps // 1)
    left = max(num_steps - warmup, 1)
    if decay_ratio:
        decay = min(max(round(decay_ratio * num_steps), 1), left)
        down = optax.linear_schedule(peak, 0.0, decay, transition_begin=left - decay)
    else:
        down = optax.cosine_decay_schedule(peak, left)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), down], [warmup])


def make_optimizer(
    config: OptimConfig, num_steps: int, boxed: Tree
) -> optax.GradientTransformation:
    """Clipping by the global norm, the update rule, and the factors of `optim.rates`.

    boxed: the trainable parameters with their logical axes (shapes suffice). Raises ConfigError for a malformed regex in
    `optim.rates` and for one that matches none of them.
    """
    rule = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[config.optimizer]
    steps = [optax.clip_by_global_norm(config.clip_norm), rule(config, num_steps, boxed)]
    if config.rates:
        steps.append(_times(_rates(config.rates, boxed)))
    return optax.chain(*steps)


def _rates(rates: Sequence[Sequence[Any]], boxed: Tree) -> Tree:
    """Per parameter the factor of the first regex that matches in its path; 1 without a match."""
    flat = flatten_dict(boxed, sep="/")
    factors = dict.fromkeys(flat, 1.0)
    for pattern, factor in reversed(rates):
        matching = flatten_dict(partition(boxed, pattern, "rates")[0], sep="/")
        factors |= dict.fromkeys(matching, factor)
    return unflatten_dict(factors, sep="/")


def _times(factors: Tree) -> optax.GradientTransformation:
    """Multiplies each update by its factor."""

    def scaled(updates: optax.Updates, _: Any) -> optax.Updates:
        return jax.tree.map(
            lambda update, factor: update if _is_masked(update) else factor * update,
            updates, _restrict(factors, updates), is_leaf=_is_masked,
        )  # fmt: skip

    return optax.stateless(scaled)


def rate(config: OptimConfig, peak: float, num_steps: int) -> optax.Schedule:
    """The schedule of `config` that reaches `peak`."""
    return schedule(peak, num_steps, config.warmup_ratio, config.decay_ratio)


def _decayed(boxed: Tree) -> Tree:
    """True for kernels and adapters, to which weight decay applies, as with PEFT under transformers' Trainer."""
    flat = flatten_dict(boxed, sep="/")
    return unflatten_dict({path: path.endswith(("/kernel", *LORA)) for path in flat}, sep="/")


def _adamw(config: OptimConfig, num_steps: int, boxed: Tree) -> optax.GradientTransformation:
    decayed = _decayed(boxed)
    return optax.adamw(
        rate(config, config.learning_rate, num_steps), config.beta1, config.beta2, config.eps,
        weight_decay=config.weight_decay, mask=lambda params: _restrict(decayed, params),
        mu_dtype=config.momentum_dtype,
    )  # fmt: skip


def _adafactor(config: OptimConfig, num_steps: int, boxed: Tree) -> optax.GradientTransformation:
    """One number per row and column of a matrix instead of two per weight, and no momentum."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, _decayed(boxed)),
        optax.scale_by_learning_rate(rate(config, config.learning_rate, num_steps)),
    )


def _muon(config: OptimConfig, num_steps: int, boxed: Tree) -> optax.GradientTransformation:
    """Muon for the hidden kernels, AdamW for everything else; weight decay applies to kernels."""
    axes = muon_axes(boxed)
    muon = optax.contrib.muon(
        rate(config, config.muon_learning_rate, num_steps),
        # Written out for each of the five iterations, optax runs them as a loop instead of unrolling them: the same bits,
        # compiled and run in less time.
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
        weight_decay=config.weight_decay,
        mu_dtype=config.momentum_dtype,
        muon_weight_dimension_numbers=lambda params: _restrict(axes, params),
    )
    labels = jax.tree.map(lambda spec: "adamw" if spec is None else "muon", axes, is_leaf=_is_spec)
    return optax.partition(
        {
            "muon": optax.chain(muon, _times(_narrowing(boxed))),
            "adamw": _adamw(config, num_steps, boxed),
        },
        labels,
    )


def _narrowing(boxed: Tree) -> Tree:
    """sqrt(outputs / inputs) of each kernel with more inputs than outputs, 1 for the others.

    An orthogonal update then changes the root mean square of a layer's output by at most the learning rate times that of
    its input, whatever the kernel's shape (Bernstein & Newhouse 2024, arXiv 2409.20325). optax.contrib.muon scales by
    sqrt(outputs / inputs) only where that is above 1, which makes the steps of a wide MLP's last map too large.
    """

    def factor(path: str, leaf: Any) -> float:
        axes = _in_and_out(path, leaf)
        if axes is None:
            return 1.0
        inputs, outputs = (math.prod(leaf.value.shape[axis] for axis in group) for group in axes)
        return min(1.0, math.sqrt(outputs / inputs))

    flat = flatten_dict(boxed, sep="/")
    return unflatten_dict({path: factor(path, leaf) for path, leaf in flat.items()}, sep="/")


def muon_axes(boxed: Tree) -> Tree:
    """The input and output axes of each parameter that Muon updates, None for those that AdamW updates.

    Muon updates the hidden kernels: those of the encoder's and the decoder's layers, the compressor and the projector. A
    kernel is [in, out], [in, heads, head dim] or [heads, head dim, out], with or without a leading "layers" axis.
    Embeddings (of tokens, patches and positions), head, filters, norms, biases and adapters are updated by AdamW.
    """

    def numbers(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = _in_and_out(path, leaf)
        return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)

    flat = flatten_dict(boxed, sep="/")
    return unflatten_dict({path: numbers(path, leaf) for path, leaf in flat.items()}, sep="/")


def _in_and_out(path: str, leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input and output axes of a boxed hidden kernel; None for any other parameter."""
    if not re.match(r"((lm|vit)/layers|compressor|projector)/.*kernel$", path):
        return None
    names = list(nn.get_partition_spec(leaf))
    stacked = names[:1] == ["layers"]
    found = tuple(range(int(stacked), len(names)))
    heads_first = len(found) == 3 and names[-1] is not None  # only head dims are unnamed at the end
    split = 2 if heads_first else 1
    return found[:split], found[split:]


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def _restrict(full: Any, params: Any) -> Any:
    """The entries of nested `full` for the leaves of `params` that optax has not masked."""
    if isinstance(params, Mapping):
        return {name: _restrict(full[name], child) for name, child in params.items()}
    return params if _is_masked(params) else full
