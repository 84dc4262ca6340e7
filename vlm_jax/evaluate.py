"""python -m vlm_jax.evaluate --config=configs/eval.py --workdir=DIR: the errors of a trained model on benchmarks.

    DIR/<benchmark>/predictions.jsonl   {"id", "text"} per line, appended batch by batch; the same command continues it
    DIR/<benchmark>/run.json            what the predictions were made with: fingerprints of weights and prompts, settings
    DIR/<benchmark>/speed.jsonl         one line per run that asked something: questions, seconds, tokens, compilations
    DIR/<benchmark>/<upload>            the file for the official server or judge, where there is one
    DIR/scores.json                     [{"benchmark", "score", "error", "n", "details"}, ...]
    DIR/errors.csv                      one row per benchmark (laws/table.py)
    DIR/questions.jsonl                 the same errors without each group of pictures (laws/questions.py), for laws.fit --questions

A workdir with answers by other weights, with other settings or to other questions is refused. If only gold answers changed,
the saved answers are scored again. A benchmark with hidden gold answers gets predictions and an upload, but no score and no row.
With eval.mode = likelihood the answer to a closed question is the most likely of its replies, found in one forward pass.
Names and families then end in _likelihood, because these are not the official numbers.

python -m vlm_jax.evaluate --score --benchmark=NAME --predictions=P --annotations=DIR [--out=F] [--allow-missing] [--convert=DIR]
scores saved predictions, in our format or as LLaVA's answers.jsonl, without a model. --convert writes them to DIR as
predictions.jsonl with our ids, and the official upload where there is one. Several processes must share the disk of DIR.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import files
from vlm_jax.benchmarks import answers
from vlm_jax.inference import evaluation
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.progress import Say, silent
from vlm_jax.settings import addresses, cli, huge_pages
from vlm_jax.settings.checks import build
from vlm_jax.settings.run import MeshConfig

log = logging.getLogger("vlm_jax.evaluate")  # __name__ is "__main__" when it is run as a module


def evaluate(cfg: ConfigDict, workdir: str, say: Say = silent) -> list[evaluation.Score]:
    """`inference.evaluation.evaluate` with the blocks `eval` and `mesh` of a config. Raises ConfigError as it does."""
    addresses.check_settings(cfg.to_dict())
    settings = EvalConfig.from_block(cfg.eval.to_dict())
    return evaluation.evaluate(settings, build(MeshConfig, cfg.mesh.to_dict()), workdir, say)


SCORE_FLAGS = ("benchmark", "predictions", "annotations")


def command(argv: Sequence[str]) -> None:
    scoring = any(word in ("--score", "-score", "--score=true") for word in argv)
    flags = cli.parse(
        argv,
        {
            "workdir": "directory of the run",
            "benchmark": "with --score: its name",
            "predictions": "with --score: a predictions.jsonl",
            "annotations": "with --score: the benchmark's files",
            "out": "with --score: also write the result to this file",
            "convert": "with --score: also write predictions.jsonl and the upload into this folder",
        },
        {
            "score": "score saved predictions, without a model",
            "allow-missing": "with --score: score the questions that are answered",
        },
        required=SCORE_FLAGS if scoring else ("config", "workdir"),
        about=__doc__ or "",
    )
    if not scoring:
        huge_pages.use()
        result: Any = evaluate(flags.config, flags.workdir, log.info)
    else:
        allow_missing = bool(flags["allow-missing"].value)
        place = (flags.predictions, flags.annotations)
        result = answers.score(flags.benchmark, *place, allow_missing, flags.convert)
    text = json.dumps(result) + "\n"
    if flags.out:
        files.write_whole(flags.out, text)
    sys.stdout.write(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
