"""python -m vlm_jax.train --config=configs/stage1.py --workdir=DIR [--config.x.y=..]: one training stage.

    DIR/config.json  checkpoints/  metrics.jsonl (every step)  tensorboard/  final.json (once it is finished)

The same command again resumes after the newest checkpoint, or returns at once when the run is finished.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import fingerprint
from vlm_jax.hf.directory import is_model
from vlm_jax.progress import Say, silent
from vlm_jax.settings import cli, huge_pages
from vlm_jax.storage import run as experiment
from vlm_jax.storage.run import last_step, open_workdir, resolve
from vlm_jax.training import outline
from vlm_jax.training.inputs import check_inputs, check_same

log = logging.getLogger(__name__)


def train(
    cfg: ConfigDict,
    workdir: str,
    given: Sequence[str] = (),
    say: Say = silent,
) -> dict[str, float]:
    """Runs the stage that `cfg` describes and returns the metrics of its last step.

    given: the fields that the command line sets (see `experiment.resolve`). say: is called with each line that reports what
    the run is going to do and what it has written.

    Raises ConfigError, before any compilation, for a wrong setting, a missing input, a directory that cannot be written,
    or a workdir that belongs to a run with other settings or on other annotations.
    """
    first = outline.opening(len(cfg.data.annotations), workdir, experiment.last_step(workdir))
    named = (cfg.model.vit.preset, cfg.model.lm.preset, *cfg.init.values())
    slow = any(name and is_model(name) for name in named)  # transformers reads them
    if slow:
        say(first)
    exp = resolve(cfg, given)
    check_inputs(exp)
    folder = open_workdir(workdir)
    check_same(exp, folder)
    finished = experiment.finished(folder)
    if finished is not None:
        for line in outline.end(exp, folder, finished):
            say(line)
        return finished
    if last_step(folder):
        fingerprint.check(exp.data, folder)
    if not slow:
        say(first)
    # Imported late: JAX, Orbax and Grain take seconds, and mistakes are reported before.
    from vlm_jax.training import loop

    return loop.run(exp, folder, say)


def command(argv: Sequence[str]) -> None:
    flags = cli.parse(argv, {"workdir": "directory of the run"}, about=__doc__ or "")
    huge_pages.use()
    train(flags.config, flags.workdir, cli.given_fields(argv), log.info)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
