"""Steps with a NaN or an infinity in the loss or the gradients: they leave the state unchanged, then the run stops or goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float

from vlm_jax import files
from vlm_jax.files import Path
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.run import TrainConfig

log = logging.getLogger(__name__)


def is_finite(loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a step may be applied. A NaN or an infinity in any gradient makes their norm one, too."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def keep_finite(ok: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` if `ok`, bit for bit, else `old`. Both are trees of the same structure; works under jit, without a sync.

    Scalar integers are always taken from `new`: they count steps for schedules and bias corrections, which a skipped step
    must not shift.
    """

    def keep(new: Array, old: Array) -> Array:
        if new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer):
            return new
        return jnp.where(ok, new, old)

    return jax.tree.map(keep, new, old)


class Guard:
    """What the host does about skipped steps: implements `train.on_nonfinite` and `train.max_skipped`."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self._limit = config.max_skipped if config.on_nonfinite == "skip" else 0
        self._workdir = workdir

    def notice(self, line: Mapping[str, Any], ids: Sequence[str]) -> None:
        """Writes nonfinite_<step>.json for a skipped step; raises ConfigError when there are more than allowed.

        line: the step's line of metrics.jsonl; ids: the records in this process's rows. Every process must call it.
        """
        step, path = line["step"], self._workdir / f"nonfinite_{line['step']}.json"
        everywhere = gather(list(ids))
        if jax.process_index() == 0:
            found = {name: line[name] for name in ("step", "loss", "grad_norm")}
            found |= {"ids_of_each_process": everywhere, "config": "config.json"}
            files.write_whole(path, json.dumps(found, indent=2) + "\n")
        told = f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}; its records are in {path}"
        if line["skipped"] <= self._limit:
            log.warning("left out (%d of at most %d): %s", line["skipped"], self._limit, told)
            return
        raise ConfigError(
            f"train: {told}; the last checkpoint is from before it. Mend the records, or lower the learning rate in a new "
            f"workdir, or go on with --config.train.on_nonfinite=skip and max_skipped above {self._limit}."
        )


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in process order. Every process must call it."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [value]
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).ravel()
    padded = np.pad(text, (0, sizes.max() - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
