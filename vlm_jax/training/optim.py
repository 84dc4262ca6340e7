"""The optimiser: which parameters train (a regex on paths), the update rule, and the learning rate schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LORA
from vlm_jax.settings.run import OptimConfig

Tree = dict[str, Any]


def partition(params: Tree, trainable: str) -> tuple[Tree, Tree]:
    """Splits nested `params` into (trainable, frozen). A path such as "lm/embed" is trainable if the regex matches in it.

    Both results are nested like `params`; `merge` is the inverse. Leaves may be boxed or abstract. Raises ConfigError when
    the regex is malformed or matches nothing.
    """
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise ConfigError(
            f"optim: trainable {trainable!r} is not a regular expression: {error}."
        ) from error
    flat = flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if pattern.search(path)}
    if not chosen:
        raise ConfigError(
            f"optim: trainable {trainable!r} matches no parameter; paths begin with "
            f"{', '.join(f'{name}/' for name in sorted(params))}."
        )
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    flat = flatten_dict(trainable, sep="/") | flatten_dict(frozen, sep="/")
    return unflatten_dict(flat, sep="/")


def schedule(peak: float, num_steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 to `peak` over ceil(warmup_ratio * num_steps) steps, then a half cosine to 0 at `num_steps`.

    Equal to transformers' `get_cosine_schedule_with_warmup`, which LLaVA uses; the first step of a warm-up has rate 0.
    """
    warmup = -int(-warmup_ratio * num_steps // 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1)),
        ],
        [warmup],
    )


def make_optimizer(
    config: OptimConfig, num_steps: int, boxed: Tree
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW, Adafactor, or Muon (hidden matrices) with AdamW (everything else).

    boxed: the trainable parameters with their logical axes (shapes suffice). Adafactor stores one number per row and column
    of a matrix instead of two per weight, and no momentum. Weight decay applies to kernels and to adapters, as with PEFT
    under transformers' Trainer.
    """
    decayed = {path: path.endswith(("/kernel", *LORA)) for path in flatten_dict(boxed, sep="/")}
    decayed = unflatten_dict(decayed, sep="/")
    adamw = optax.adamw(
        schedule(config.learning_rate, num_steps, config.warmup_ratio), config.beta1, config.beta2, config.eps,
        weight_decay=config.weight_decay, mask=lambda params: _restrict(decayed, params),
        mu_dtype=config.momentum_dtype,
    )  # fmt: skip
    if config.optimizer == "adamw":
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    if config.optimizer == "adafactor":
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(
                schedule(config.learning_rate, num_steps, config.warmup_ratio)
            ),
        )
    axes = muon_axes(boxed)
    muon = optax.contrib.muon(
        schedule(config.muon_learning_rate, num_steps, config.warmup_ratio),
        weight_decay=config.weight_decay,
        mu_dtype=config.momentum_dtype,
        muon_weight_dimension_numbers=lambda params: _restrict(axes, params),
    )
    labels = jax.tree.map(lambda spec: "adamw" if spec is None else "muon", axes, is_leaf=_is_spec)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition({"muon": muon, "adamw": adamw}, labels),
    )


def muon_axes(boxed: Tree) -> Tree:
    """The input and output axes of each parameter that Muon updates, None for those that AdamW updates.

    Muon updates the hidden kernels: those of the encoder's and the decoder's layers, the compressor and the projector. A
    kernel is [in, out], [in, heads, head dim] or [heads, head dim, out], with or without a leading "layers" axis.
    Embeddings (of tokens, patches and positions), head, filters, norms, biases and adapters are updated by AdamW.
    """

    def axes(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not re.match(r"((lm|vit)/layers|compressor|projector)/.*kernel$", path):
            return None
        names = list(nn.get_partition_spec(leaf))
        stacked = names[:1] == ["layers"]
        found = list(range(int(stacked), len(names)))
        split = (
            2 if len(found) == 3 and names[-1] is not None else 1
        )  # only head dims are unnamed at the end
        return optax.contrib.MuonDimensionNumbers(tuple(found[:split]), tuple(found[split:]))

    flat = flatten_dict(boxed, sep="/")
    return unflatten_dict({path: axes(path, leaf) for path, leaf in flat.items()}, sep="/")


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def _restrict(full: Any, params: Any) -> Any:
    """The entries of nested `full` for the leaves of `params` that optax has not masked."""
    if isinstance(params, Mapping):
        return {name: _restrict(full[name], child) for name, child in params.items()}
    return params if isinstance(params, optax.MaskedNode) else full
