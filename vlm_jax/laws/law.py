"""What is known of a fitted law, and its file law.json: numbers, statements, resamples, provenance."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vlm_jax import files
from vlm_jax.files import to_path
from vlm_jax.laws.least_squares import BILLION, Law, power_law
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

LAW_FORMAT = 2
Interval = tuple[float, float]
QUESTIONS = "questions"  # the name of intervals over questions, beside those of resampling modes
CONSTANTS = ("A", "alpha", "beta", "D", "alpha/beta")
_LAWS = ("law", "law_d_zero", "law_nonnegative")
_LISTS = ("visual_tokens", "left_out", "down_weighted", "statements")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another law for the same cells, and how well it does. Lower criteria are better; a gap below 2 settles nothing."""

    formula: str  # N in billions
    constants: dict[str, float]
    num_constants: int
    sse: float
    rmse: float
    aicc: float | None  # corrected for few cells; None where there are too few
    bic: float
    # LM -> (mean, largest) relative error of its cells, by the law of the other sizes
    held_out: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Check:
    """Given exponents against the table: A and D are the best ones beside them."""

    law: Law
    sse_ratio: float  # to the best law's sum of squares
    f: float  # of the F test that both exponents are these
    f_limit: float  # the joint region's edge
    p: float
    inside: bool  # the joint region of (alpha, beta) at the fit's level


@dataclasses.dataclass(frozen=True)
class Fit:
    """One family's law and how sure it is.

    `profile` holds the headline intervals; `intervals` are percentiles of resamples, `tails` from either end.
    """

    family: str
    benchmark: str
    compressor: str
    law: Law
    law_d_zero: Law  # with D = 0: its exponents are the ones to compare when D is not identified
    law_nonnegative: Law  # the same with alpha, beta >= 0
    sse_nonnegative: float
    d_fixed: bool
    sse: float  # over cells, of seed means, weighted (weights have mean 1)
    r2: float
    max_relative_error: float
    num_cells: int
    num_seeds: int
    level: float
    intervals: dict[str, dict[str, Interval | None]]  # resampling mode -> constant -> interval
    tails: dict[str, float]  # resampling mode -> percent cut off at either end for `level`
    p_alpha_greater: dict[str, float]  # resampling mode -> share of resamples with alpha > beta
    d_profile: dict[str, Interval | None]  # constant -> its range over every D that fits as well
    profile: dict[str, Interval | None]  # constant -> its profile-likelihood interval
    alternatives: tuple[Alternative, ...]
    weights: str  # even | binomial
    loss: str  # squares | huber
    down_weighted: tuple[str, ...]  # cells that a robust loss counts less, and how much
    check: Check | None  # exponents that were asked about
    resamples: Float[np.ndarray, "R 4"]  # A alpha beta D, of the headline mode
    mode: str  # the headline among resampling modes
    lms: dict[str, int | float]  # name -> parameters, as measured
    visual_tokens: tuple[int, ...]
    left_out: tuple[str, ...]  # rows that were not fitted, and why
    cells: tuple[
        tuple[float, ...], ...
    ] = ()  # N in billions, V, error, weight, training samples or 0
    benchmarks: tuple[str, ...] = ()  # the ones that the error is the mean of
    elastic: bool = False  # of trainings that each served all numbers of visual tokens
    question_error: float | None = (
        None  # largest standard error of a cell over questions, if asked for
    )
    question_shares: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # benchmark -> of that variance
    statements: tuple[str, ...] = ()  # what the numbers say, one sentence each; see `words.py`

    def drawn_errors(self, lm_params: Any, visual_tokens: Any) -> np.ndarray:
        """By the law of each resample: [R c] for c sizes and token counts."""
        return power_law(self.resamples.T[..., None], lm_params, visual_tokens)

    @property
    def trained(self) -> str:
        """The compressor and, where it is elastic, that one training of each LM served all numbers of visual tokens."""
        return f"{self.compressor}{', one training per LM' * self.elastic}"

    @property
    def d_identified(self) -> bool:
        return not self.d_fixed and self.d_profile["D"] is not None and self.d_profile["D"][0] > 0


class Forecast(NamedTuple):
    """A law as a plan asks it. Both functions take parameters of LMs and visual tokens, [c]."""

    formula: str
    error: Callable[[Any, Any], np.ndarray]
    drawn_errors: Callable[[Any, Any], np.ndarray]  # of each resample, [R c]
    tail: float  # percent of resamples to cut off at either end of an interval


def rows_of(rows: Sequence[Row], fit: Fit) -> list[Row]:
    """The measurements behind a fit, flagged ones included."""
    kind = (fit.family, fit.compressor, fit.elastic)
    own = [row for row in rows if (row.family, row.compressor, row.elastic) == kind]
    return [row for row in own if row.benchmark in (fit.benchmarks or (fit.benchmark,))] or own


def benchmarks_of(rows: Sequence[Row], fit: Fit) -> list[str]:
    return list(dict.fromkeys(row.benchmark for row in rows_of(rows, fit)))


def provenance(source: str, command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What made a law.json: the table, the command and the options."""
    return {"table": source, "command": command, "options": dict(options), "unit_of_N": BILLION}


def save(path: str | os.PathLike[str], fits: Mapping[str, Fit], made_by: Mapping[str, Any]) -> None:
    """Writes law.json; numbers keep 8 digits, resamples 6."""
    files.write_whole(path, json.dumps(as_dict(fits, made_by), indent=1, allow_nan=False) + "\n")


def as_dict(fits: Mapping[str, Fit], made_by: Mapping[str, Any]) -> dict[str, Any]:
    laws = {}
    for family, fit in fits.items():
        fields = dataclasses.asdict(fit)
        drawn = [[float(f"{x:.6g}") for x in row] for row in fields.pop("resamples")]
        derived = {"ratio": fit.law.ratio, "d_identified": fit.d_identified}
        laws[family] = fields | derived | {"resamples": drawn}
    return {
        "format": LAW_FORMAT,
        "formula": "error = A (N/1e9)^-alpha V^-beta + D",
        "laws": laws,
        "provenance": dict(made_by),
    }


def load(path: str | os.PathLike[str]) -> dict[str, Fit]:
    """Reads law.json; raises ConfigError on a file that is not one."""
    path, again = to_path(path), "make it again with python -m vlm_jax.laws.fit."
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; make it with python -m vlm_jax.laws.fit errors.csv --out {path.name}."
        )
    content = files.read_json(path)
    if content.get("format") != LAW_FORMAT:
        raise ConfigError(f"{path}: not a law.json of format {LAW_FORMAT}; {again}")
    try:
        fits = {family: _from_dict(fields) for family, fields in content["laws"].items()}
        broken = [family for family, fit in fits.items() if not _is_whole(fit)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{path}: is damaged ({reason}); {again}") from error
    if broken:
        raise ConfigError(
            f"{path}: is damaged (the law of family {broken[0]!r} has no finite constants, resamples or sizes); {again}"
        )
    if not fits:
        raise ConfigError(f"{path}: holds no law; {again}")
    return fits


def _is_whole(fit: Fit) -> bool:
    """Whether a law can be asked: finite constants and resamples, sizes and token counts it was measured on."""
    constants = np.array([*dataclasses.astuple(fit.law), *fit.lms.values()], float)
    resamples = fit.resamples.ndim == 2 and fit.resamples.shape[1] == 4 and len(fit.resamples) > 0
    finite = bool(np.isfinite(constants).all() and np.isfinite(fit.resamples).all())
    return resamples and finite and bool(fit.lms and fit.visual_tokens) and fit.mode in fit.tails


def _from_dict(fields: dict[str, Any]) -> Fit:
    values = {f.name: fields[f.name] for f in dataclasses.fields(Fit) if f.name in fields}
    values |= {name: Law(**fields[name]) for name in _LAWS}
    values["alternatives"] = tuple(
        Alternative(**law | {"held_out": _pairs(law["held_out"])}) for law in fields["alternatives"]
    )
    if fields["check"] is not None:
        values["check"] = Check(**fields["check"] | {"law": Law(**fields["check"]["law"])})
    values["intervals"] = {mode: _pairs(group) for mode, group in fields["intervals"].items()}
    values |= {name: _pairs(fields[name]) for name in ("d_profile", "profile")}
    values |= {name: tuple(fields[name]) for name in _LISTS}
    values["cells"] = tuple(map(tuple, fields.get("cells", ())))
    values["benchmarks"] = tuple(fields.get("benchmarks", ()))
    values["resamples"] = np.asarray(fields["resamples"], float)
    return Fit(**values)


def _pairs(group: dict[str, Any]) -> dict[str, Any]:
    return {name: None if pair is None else tuple(pair) for name, pair in group.items()}
