"""python -m vlm_jax.features --config=configs/stage1.py --workdir=DIR [--config.x.y=..]: an encoder's features, computed once.

Encodes every image that data.annotations names with the encoder of init.vit or init.from (a training run or a model directory) and
writes them to DIR; runs with the same encoder and --config.data.features_dir=DIR (evaluations: eval.features_dir) then read
them in place of the images. DIR is filled at once, when all are encoded; the same command again finds it finished.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import feature_cache
from vlm_jax.files import to_path
from vlm_jax.hf.directory import is_model
from vlm_jax.settings import cli, huge_pages
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment
from vlm_jax.storage.inherit import check_part
from vlm_jax.training import inputs

log = logging.getLogger(__name__)


def write_features(cfg: ConfigDict, folder: str, given: Sequence[str] = ()) -> None:
    """given: the fields that a command line set (see `experiment.resolve`).

    Raises ConfigError, before anything heavy is imported, for wrong settings, missing inputs, or another cache in `folder`.
    """
    cfg = cfg.copy_and_resolve_references()
    cfg.data.features_dir = ""
    exp = experiment.resolve(cfg, given)
    feature_cache.check_cacheable(exp.model)
    inputs.check_sources(exp.data)
    source = exp.init.sources["vit"]
    if not source:
        raise ConfigError(
            "features: init.vit and init.from are empty; give the training run or the model directory whose encoder computes the features."
        )
    inputs.check_source("vit", source, exp.model)
    if not is_model(source):
        check_part("vit", source, experiment.read(source), exp)
    out = to_path(folder).absolute()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        feature_cache.check(folder, exp.model, exp.data)
    experiment.open_workdir(folder, checkpoints=False)
    from vlm_jax.inference import features  # here, not above: jax takes seconds

    features.cache(exp, out)
    log.info("features: %s; use it with --config.data.features_dir=%s", out, folder)


def command(argv: Sequence[str]) -> None:
    flags = cli.parse(argv, {"workdir": "directory of the features"}, about=__doc__ or "")
    huge_pages.use()
    write_features(flags.config, flags.workdir, cli.given_fields(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
