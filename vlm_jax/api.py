"""The package's functions for Python and notebooks; `vlm_jax.load` and the others are these.

    model = vlm_jax.load("runs/instruct")             a model that answers
    run = vlm_jax.start("stage1", "runs/align", ...)  a training, to its end
    law = vlm_jax.fit("errors.csv")["reasoning"]      the scaling law of a table
    law.plan(gflops=1000, text_tokens=50)             the best (LM, visual tokens) for a budget

The training function is `start` and not `train`, because `vlm_jax.train` is the module of `python -m vlm_jax.train`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_jax.costs.price import Budget, Workload, find_chip
from vlm_jax.files import to_path
from vlm_jax.hf.directory import is_model
from vlm_jax.laws import fitting, planning, table
from vlm_jax.laws.choice import Plan
from vlm_jax.laws.law import Fit
from vlm_jax.settings import addresses, cli, logs
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.hub import hub_hint
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import opened
from vlm_jax.storage import run as experiment

if TYPE_CHECKING:
    from vlm_jax.inference.model import Model

Where = str | os.PathLike[str]


def load(
    where: Where = "",
    *,
    lm: Where = "",
    vit: Where = "",
    compressor: Where = "",
    template: str = "",
    dtype: str = "",
    mesh: MeshConfig | None = None,
) -> Model:
    """A model to ask.

    Args:
      where: a workdir of a training, at its newest checkpoint; a LLaVA directory of the Hugging Face hub; or a release in
        the original LLaVA layout (LLaVA, QueCC, TokenPacker, MQT), which may need `vit`, its encoder's directory.
      lm, vit, compressor: the parts instead of `where`, each a run or a model directory. compressor holds the projector
        too; where it is a run, lm and vit may be left out.
      template: the prompt format of a model directory, a key of data.templates.TEMPLATES; "" = by its tokenizer.
      dtype: float32 or bfloat16, of the computation, and of the parameters of a model directory; "" = as the run has it,
        float32 for a directory.
      mesh: how the model is split over devices; None = the first device alone.

    Nothing is downloaded. Compiled programs are kept on disk (`sharding.keep_programs`). Raises ConfigError, in one
    line, for what cannot be loaded.
    """
    paths = {name: os.fspath(x) for name, x in (("where", where), ("lm", lm), ("vit", vit), ("compressor", compressor))}  # fmt: skip
    for name, path in paths.items():
        addresses.check_usable(f"load: {name}", path)
    if dtype not in ("", "float32", "bfloat16"):
        raise ConfigError(f"load: dtype must be float32 or bfloat16, got {dtype!r}.")
    found = _opened(**paths, template=template, param_dtype=dtype or "float32")
    if dtype:
        parts = {p: dataclasses.replace(getattr(found.model, p), dtype=dtype) for p in ("vit", "lm", "compressor")}  # fmt: skip
        found = dataclasses.replace(found, model=dataclasses.replace(found.model, **parts))
    from vlm_jax import sharding
    from vlm_jax.inference import model  # jax and orbax take seconds; mistakes are said before

    logs.quieten()
    sharding.keep_programs()
    return model.Model(found, mesh)


def _opened(
    where: str, lm: str, vit: str, compressor: str, template: str, param_dtype: str
) -> opened.Opened:
    if bool(where) == bool(compressor) or (where and lm):
        raise ConfigError(
            "load: give a run or a model directory, load(DIR), or the parts: load(lm=DIR, vit=DIR, compressor=RUN)."
        )
    if compressor:
        _check_there(compressor)
        return opened.from_parts(lm, vit, compressor, template, param_dtype)
    _check_there(where)
    if is_model(where):
        return opened.from_directory(where, vit, template, param_dtype)
    if experiment.last_step(where) is None:
        experiment.read(where)  # says what is wrong with the directory
        raise ConfigError(f"load: {where!r} has no finished checkpoint; train first.")
    if vit or template:
        raise ConfigError("load: a run has its own encoder and template; leave vit and template out.")  # fmt: skip
    return opened.from_run(where)


def _check_there(path: str) -> None:
    if not to_path(path).is_dir():
        raise ConfigError(f"load: {path!r} is no directory.{hub_hint(path)}")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that has ended."""

    workdir: str
    metrics: Mapping[str, float]  # of its last step

    def model(self, **options: Any) -> Model:
        """The trained model; options: those of `load`."""
        return load(self.workdir, **options)

    def evaluate(
        self, benchmarks: Mapping[str, Where], workdir: Where = "", **settings: Any
    ) -> list[Mapping[str, Any]]:
        """The scores of {benchmark: directory of its files}, as `python -m vlm_jax.evaluate` writes them.

        workdir: "" = WORKDIR/eval. settings: fields of EvalConfig, such as limit=100. Raises ConfigError for a wrong one.
        """
        from vlm_jax.inference import evaluation  # jax takes seconds
        from vlm_jax.inference.settings import EvalConfig
        from vlm_jax.settings.checks import build

        given = {"batch_size": 16, "max_new_tokens": 128, **settings}
        names, places = tuple(benchmarks), tuple(os.fspath(p) for p in benchmarks.values())
        fields = {"checkpoint": self.workdir, "benchmarks": names, "annotations": places}
        out = os.fspath(workdir) or str(to_path(self.workdir) / "eval")
        return list(evaluation.evaluate(build(EvalConfig, fields | given), MeshConfig(), out))


def start(config: Any, workdir: Where, **fields: Any) -> Run:
    """Trains one stage to its end, or goes on where `workdir` stopped, as `python -m vlm_jax.train` does.

    config: a ConfigDict, or the name or file of one, such as "stage1". fields: overrides with their dots as "__", such as
    train__num_steps=100 or init__from="runs/align". Raises ConfigError before anything compiles.
    """
    from vlm_jax import train

    cfg = cli.load_config(config) if isinstance(config, str) else config
    names = tuple(name.replace("__", ".") for name in fields)
    words = [f"--config.{name}=" for name in names]
    if isinstance(config, str):
        cli.check_overrides([f"--config={config}", *words])
    for name, value in zip(names, fields.values(), strict=True):
        try:
            with cfg.unlocked():
                cfg.update_from_flattened_dict({name: _fitting(cfg, name, value)})
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"start: {name.replace('.', '__')}={value!r}: {error}") from error
    return Run(os.fspath(workdir), train.train(cfg, os.fspath(workdir), names))


def _fitting(cfg: Any, name: str, value: Any) -> Any:
    """A value for a field of a config: one path is a list of one where the field holds several."""
    for part in name.split("."):
        cfg = cfg[part]
    return (value,) if isinstance(cfg, tuple) and isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Law:
    """error = A / (N^alpha V^beta) + D, fitted to one family of benchmarks; `fit` holds constants and intervals."""

    fit: Fit

    @property
    def alpha(self) -> float:
        """The exponent of the language model's size."""
        return self.fit.law.alpha

    @property
    def beta(self) -> float:
        """The exponent of the number of visual tokens."""
        return self.fit.law.beta

    def error(self, lm_params: float, visual_tokens: float) -> float:
        """The error that the law gives."""
        return float(self.fit.law.error(lm_params, visual_tokens))

    def plan(
        self,
        *,
        text_tokens: int,
        gflops: float | None = None,
        ms: float | None = None,
        dollars: float | None = None,
        gib: float | None = None,
        chip: str = "",
        chip_hour_dollars: float | None = None,
        output_tokens: int = 0,
        batch: int = 1,
        cached: bool = False,
    ) -> Plan:
        """The best (LM, visual tokens) for one budget; `.best` is it. The arguments are flags of `vlm_jax.laws.plan`.

        Raises ConfigError unless exactly one budget is given (gib may stand beside another).
        """
        limits = {"gflops": gflops, "ms": ms, "dollars": dollars, "gib": gib}
        given = {kind: limit for kind, limit in limits.items() if limit is not None}
        main = [kind for kind in given if kind != "gib"] or list(given)
        if len(main) != 1:
            raise ConfigError("plan: give one of gflops, ms, dollars, gib.")
        kind = main[0]
        beside = gib if kind != "gib" else None
        found = find_chip(chip) if chip else None
        budget = Budget(kind, given[kind], found, chip_hour_dollars, beside)
        work = Workload(text_tokens, cached, output_tokens, batch)
        return planning.choose(self.fit, budget, work)


def fit(errors: Where | Sequence[table.Row], **options: Any) -> dict[str, Law]:
    """The law of each family of a table: errors.csv or its rows. options: those of laws.fitting.fit_family."""
    rows = table.read(errors) if isinstance(errors, (str, os.PathLike)) else errors
    return {family: Law(found) for family, found in fitting.fit_table(rows, **options).items()}
