"""errors.csv: one row per (benchmark, language model, visual tokens, compressor, seed), its error and its cost.

Three columns are enough for a table of one's own: lm_params, visual_tokens, error. Lines that begin with `#` are comments.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError

REQUIRED = ("lm_params", "visual_tokens", "error")
Number = int | float
SMALLEST_LM = 1_000  # parameters; below it the column surely holds billions


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: the error of one trained model on one benchmark."""

    lm_params: Number  # parameters of the language model, not billions
    visual_tokens: int  # per image, after compression; at least 1
    error: Number  # 1 - metric, in [0, 1]
    benchmark: str = "all"
    family: str = "all"  # reasoning | ocr | ...; one law is fitted per family
    lm: str = ""  # name; read() fills an empty one from lm_params
    compressor: str = ""
    n: int | None = None  # scored samples
    seed: int = 0  # of the training run
    flops: Number | None = None  # forward FLOPs of one question, encoder to last answer token
    seconds: Number | None = None  # wall clock per question
    flag: str = ""  # why this cell failed ("chance level"); a flagged row is shown, never fitted

    @property
    def key(self) -> tuple:
        """What makes two rows the same measurement."""
        return (
            self.benchmark,
            self.family,
            self.lm,
            self.visual_tokens,
            self.compressor,
            self.seed,
        )

    @property
    def cell(self) -> tuple[str, int]:
        return (self.lm, self.visual_tokens)


COLUMNS = (
    "benchmark", "family", "lm", "lm_params", "visual_tokens", "compressor", "error", "n", "seed", "flops",
    "seconds", "flag",
)  # fmt: skip
_TEXT = ("benchmark", "family", "lm", "compressor", "flag")
_WHOLE = ("visual_tokens", "n", "seed")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Row)}


def paper_flops(
    lm_params: Number | np.ndarray, text_tokens: Number, visual_tokens: Number | np.ndarray
) -> Number | np.ndarray:
    """2 N (Q + V): the forward FLOPs of one prefill as the paper counts them (arXiv 2411.03312, section 3).

    Leaves out the encoder, the compressor, the query pass, attention's quadratic term and the answer's tokens;
    `flops.forward_flops` counts all of them.
    """
    return 2.0 * lm_params * (text_tokens + visual_tokens)


def size_name(params: Number) -> str:
    """7e9 -> "7B", 24576 -> "24.6k"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if params >= unit:
            return f"{params / unit:.3g}{letter}"
    return f"{params:.0f}"


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Reads and validates a table; errors name the file, the line and the column."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; give a CSV with the columns {', '.join(REQUIRED)}."
        )
    lines = [
        (number, line)
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise ConfigError(f"{path}: the table is empty; its first line must name the columns.")
    records = list(csv.reader(line for _, line in lines))
    header = [name.strip() for name in records[0]]
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ConfigError(
            f"{path}: column {missing[0]!r} is missing (found {', '.join(header)}); needed: {', '.join(REQUIRED)}."
        )
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise ConfigError(f"{path}: unknown column {unknown[0]!r}; allowed: {', '.join(COLUMNS)}.")
    rows = []
    for (number, _), record in zip(lines[1:], records[1:], strict=True):
        where = f"{path}:{number}"
        if len(record) != len(header):
            raise ConfigError(f"{where}: {len(record)} values for {len(header)} columns.")
        rows.append(_parse(dict(zip(header, record, strict=True)), where))
    validate(rows, str(path))
    return rows


def _parse(record: dict[str, str], where: str) -> Row:
    fields: dict[str, Any] = {}
    for name, text in record.items():
        text = text.strip()
        if name in _TEXT:
            fields[name] = text or _DEFAULTS[name]
            continue
        if not text and name not in REQUIRED:
            continue
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{where}: {name} {text!r} is not a number.") from None
        if name != "error" and not math.isfinite(value):  # _check has words for an error
            raise ConfigError(f"{where}: {name} {text!r} is not a finite number.")
        if name in _WHOLE:
            if not value.is_integer():
                raise ConfigError(f"{where}: {name} {text!r} is not a whole number.")
            value = int(value)
        fields[name] = value
    _check(fields, where)
    if not fields.get("lm"):
        fields["lm"] = size_name(fields["lm_params"])
    return Row(**fields)


def _check(fields: dict, where: str) -> None:
    error, params, tokens = (fields[name] for name in ("error", "lm_params", "visual_tokens"))
    if not 0 <= error <= 1:  # also NaN
        hint = "; divide percentages by 100" if 1 < error <= 100 else ""
        raise ConfigError(f"{where}: error {error:g} is outside [0, 1]; error = 1 - metric{hint}.")
    if not SMALLEST_LM <= params < math.inf:
        hint = f"; give parameters, not billions ({params * 1e9:g}?)" if params > 0 else ""
        raise ConfigError(f"{where}: lm_params {params:g} is below {SMALLEST_LM}{hint}.")
    if tokens < 1:
        raise ConfigError(f"{where}: visual_tokens {tokens} must be at least 1.")


def validate(rows: Sequence[Row], where: str = "errors table") -> None:
    """Raises ConfigError on values out of range, duplicate cells and one LM name with two sizes."""
    if not rows:
        raise ConfigError(f"{where}: the table has no rows.")
    seen: set[tuple] = set()
    sizes: dict[str, float] = {}
    for row in rows:
        _check(dataclasses.asdict(row), where)
        name = f"lm {row.lm}, {row.visual_tokens} visual tokens"
        if row.key in seen:
            raise ConfigError(
                f"{where}: duplicate cell ({row.family}/{row.benchmark}, {name}, seed {row.seed}); "
                "keep one row, or give repeated runs different seeds."
            )
        seen.add(row.key)
        if sizes.setdefault(row.lm, row.lm_params) != row.lm_params:
            raise ConfigError(
                f"{where}: lm {row.lm!r} has two sizes, {sizes[row.lm]:g} and {row.lm_params:g}; use one."
            )


def _format(value: Number | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value % 1 == 0 and abs(value) < 1e15 else repr(value)
    return str(value)


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Replaces the table in one step: a reader sees the old file or the new one, never half of it."""
    rows = list(rows)
    validate(rows, str(path))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_format(getattr(row, name)) for name in COLUMNS] for row in rows)
    part = Path(f"{os.fspath(path)}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def append(path: str | os.PathLike[str], rows: Iterable[Row]) -> list[Row]:
    """Adds rows to a table that may not exist yet; a row whose key is there already takes its place.

    Calling it twice with the same rows leaves the same file. Returns the whole table.
    """
    merged = {row.key: row for row in read(path)} if Path(path).is_file() else {}
    merged.update((row.key, row) for row in rows)
    write(path, merged.values())
    return list(merged.values())


def _mean(values: Sequence[Number | None]) -> float | None:
    """None where one of them is unknown."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def family_mean(rows: Sequence[Row], family: str) -> list[Row]:
    """The family's error: per (LM, visual tokens, compressor, seed) the unweighted mean over its benchmarks.

    Every cell must have been measured on the same benchmarks, else their means would not be comparable.
    A cell is flagged when one of its rows is. Source of the unweighted mean: the paper's section 3.2.
    """
    rows = [row for row in rows if row.family == family]
    benchmarks = sorted({row.benchmark for row in rows})
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.lm, row.visual_tokens, row.compressor, row.seed), []).append(row)
    means = []
    for (lm, tokens, _, seed), group in groups.items():
        missing = sorted(set(benchmarks) - {row.benchmark for row in group})
        if missing:
            raise ConfigError(
                f"family {family!r}: lm {lm}, {tokens} visual tokens, seed {seed} has no row for benchmark "
                f"{missing[0]!r}; measure it, or name one benchmark."
            )
        means.append(
            dataclasses.replace(
                group[0],
                benchmark=benchmarks[0] if len(benchmarks) == 1 else "mean",
                error=float(np.mean([row.error for row in group])),
                n=None if any(row.n is None for row in group) else sum(row.n or 0 for row in group),
                flops=_mean([row.flops for row in group]),
                seconds=_mean([row.seconds for row in group]),
                flag="; ".join(dict.fromkeys(row.flag for row in group if row.flag)),
            )
        )
    return sorted(
        means, key=lambda row: (row.lm_params, row.lm, row.visual_tokens, row.compressor, row.seed)
    )
