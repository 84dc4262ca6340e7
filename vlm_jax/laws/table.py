"""errors.csv: one row per (benchmark, language model, visual tokens, compressor, seed), its error and its cost.

Three columns are enough for a table of one's own: lm_params, visual_tokens, error. Lines that begin with `#` are comments.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax import files
from vlm_jax.costs.price import Number
from vlm_jax.files import Path, to_path
from vlm_jax.settings import addresses, presets
from vlm_jax.settings.checks import ConfigError
from vlm_jax.settings.model import LMConfig
from vlm_jax.settings.presets import size_name

REQUIRED = ("lm_params", "visual_tokens", "error")
DIVIDERS = ",;\t"  # of cells; of equally many the first
COMMAS = re.compile(r"[-+]?[\d.]*,[\d.,]*([eE][-+]?\d+)?")  # 0,42, 7,000,000 and 1,1e9
LARGEST_LM, MOST_TOKENS = 1e15, 1e9  # beyond which powers of them overflow, and no model lies
SMALLEST_LM = 1_000  # parameters; below it the column surely holds billions

# What counts as N: the table's own numbers, or each preset's size by name, with or without embeddings.
GIVEN = "given"
COUNTS: dict[str, Callable[[LMConfig], Number]] = {
    "nominal": lambda lm: lm.nominal_params,  # as in the model's name: 7B
    "total": lambda lm: lm.total_params,
    "non-embedding": lambda lm: lm.non_embedding_params,
}
SIZES = (GIVEN, *COUNTS)


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
    train_samples: int | None = None  # that the model was trained on; None: not known
    validation_loss: Number | None = (
        None  # of the training, in nats per token, where one was measured
    )
    elastic: bool = False  # one training of the LM served this and other numbers of visual tokens

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
            self.train_samples,
            self.elastic,
        )

    @property
    def cell(self) -> tuple[str, int]:
        return (self.lm, self.visual_tokens)


def spell_pair(lm: str, visual_tokens: int) -> str:
    """ "qwen1.5-7b with 16 visual tokens" """
    return f"{lm} with {visual_tokens} visual token{'' if visual_tokens == 1 else 's'}"


COLUMNS = (
    "benchmark", "family", "lm", "lm_params", "visual_tokens", "compressor", "error", "n", "seed", "flops",
    "seconds", "flag", "train_samples", "validation_loss",
    "elastic",
)  # fmt: skip
_TEXT = ("benchmark", "family", "lm", "compressor", "flag")
_WHOLE = ("visual_tokens", "n", "seed", "train_samples")
VALIDATION_LOSS = (
    "validation_loss"  # what a law can be fitted to in place of errors, like a benchmark
)
ELASTIC = {"yes": True, "no": False}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Row)}


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Reads and validates a table; errors name the file, the line and the column.

    Cells are divided by commas, or by the semicolons or tabs that divide the header. Empty lines do not count.
    """
    addresses.check_usable("table", os.fspath(path))
    path = to_path(path)
    if path.is_dir():
        raise ConfigError(
            f"{path}: is a directory; give the table in it, such as {path / 'errors.csv'}."
        )
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; give a CSV with the columns {', '.join(REQUIRED)}."
        )
    records = list(_records(files.read_text(path), path))
    if not records:
        raise ConfigError(f"{path}: the table is empty; its first line must name the columns.")
    header = _header(*records[0], path)
    rows, lines = [], []
    for number, record in records[1:]:
        where = f"{path}:{number}"
        if len(record) != len(header):
            raise ConfigError(f"{where}: {len(record)} values for {len(header)} columns.")
        rows.append(_parse(dict(zip(header, record, strict=True)), where))
        lines.append(number)
    validate(rows, str(path), lines)
    return rows


def read_all(paths: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The rows of several tables, which may not hold one cell twice."""
    rows = [row for path in paths for row in read(path)]
    validate(rows, " and ".join(os.fspath(path) for path in paths))
    return rows


def _records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(its first line's number, cells) of everything but comments and empty lines; a quoted cell may hold line breaks."""
    lines = enumerate(io.StringIO(text, newline=""), 1)
    divider = ""
    for number, line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        divider = divider or max(DIVIDERS, key=line.count)  # the header has names only
        rest = itertools.chain([line], (more for _, more in lines))
        try:
            cells = next(csv.reader(rest, delimiter=divider, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{path}:{number}: is not valid CSV: {error}.") from error
        cells = [" ".join(cell.split()) for cell in cells]
        if any(cells):  # spreadsheets leave lines of dividers alone
            yield number, cells


def _header(number: int, names: Sequence[str], path: Path) -> Sequence[str]:
    """The columns' names, each known and there once."""
    where = f"{path}:{number}"
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        like = [name for name in names if name.lower() == missing[0]]
        hint = f"; write {like[0]!r} in small letters" if like else ""
        raise ConfigError(
            f"{where}: column {missing[0]!r} is missing{hint} (found {', '.join(names)}); needed: {', '.join(REQUIRED)}."
        )
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        hint = " (pandas writes its index there: to_csv(.., index=False))" if not unknown[0] else ""
        raise ConfigError(
            f"{where}: unknown column {unknown[0]!r}{hint}; allowed: {', '.join(COLUMNS)}."
        )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{where}: column {twice[0]!r} is there twice; keep the one that counts.")
    return names


def _parse(record: dict[str, str], where: str) -> Row:
    fields: dict[str, Any] = {}
    for name, text in record.items():
        if name in _TEXT:
            fields[name] = text or _DEFAULTS[name]
            continue
        if not text and name not in REQUIRED:
            continue
        if name == "elastic":
            if text not in ELASTIC:
                raise ConfigError(f"{where}: elastic {text!r} must be yes, no or empty.")
            fields[name] = ELASTIC[text]
            continue
        value = _number(text, f"{where}: {name}")
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


def _number(text: str, where: str) -> float:
    try:
        if "_" in text:  # 1_000 is a number to Python alone
            raise ValueError
        return float(text)
    except ValueError:
        hint = "; write a decimal point, and no commas" if COMMAS.fullmatch(text) else ""
        raise ConfigError(f"{where} {text!r} is not a number{hint}.") from None


def _check(fields: dict, where: str) -> None:
    error, params, tokens = (fields[name] for name in ("error", "lm_params", "visual_tokens"))
    if not 0 <= error <= 1:  # also NaN
        hint = "; divide percentages by 100" if 1 < error <= 100 else ""
        raise ConfigError(f"{where}: error {error:g} is outside [0, 1]; error = 1 - metric{hint}.")
    if not SMALLEST_LM <= params < math.inf:
        hint = f"; give parameters, not billions ({params * 1e9:g}?)" if params > 0 else ""
        raise ConfigError(f"{where}: lm_params {params:g} is below {SMALLEST_LM}{hint}.")
    if params > LARGEST_LM:
        raise ConfigError(f"{where}: lm_params {params:g} is above {LARGEST_LM:g}.")
    if not 1 <= tokens <= MOST_TOKENS:
        bound = "at least 1" if tokens < 1 else f"at most {MOST_TOKENS:g}"
        raise ConfigError(f"{where}: visual_tokens {tokens:g} must be {bound}.")
    for name in ("n", "flops", "seconds", "train_samples", "validation_loss"):
        if (fields.get(name) or 0) < 0:
            raise ConfigError(f"{where}: {name} {fields[name]:g} is negative; leave it empty.")


def validate(
    rows: Sequence[Row], where: str = "errors table", lines: Sequence[int] | None = None
) -> None:
    """Raises ConfigError on values out of range, duplicate cells and one LM name with two sizes.

    lines: where each row stands in the file `where`.
    """
    if not rows:
        raise ConfigError(f"{where}: the table has no rows.")
    seen: dict[tuple, int] = {}
    sizes: dict[str, Number] = {}
    for i, row in enumerate(rows):
        place = where if lines is None else f"{where}:{lines[i]}"
        _check(dataclasses.asdict(row), place)
        name = f"lm {row.lm}, {row.visual_tokens} visual tokens"
        if row.key in seen:
            first = "" if lines is None else f", also in line {lines[seen[row.key]]}"
            raise ConfigError(
                f"{place}: duplicate cell ({row.family}/{row.benchmark}, {name}, seed {row.seed}){first}; "
                "keep one row, or give repeated runs different seeds."
            )
        seen[row.key] = i
        if sizes.setdefault(row.lm, row.lm_params) != row.lm_params:
            raise ConfigError(
                f"{place}: lm {row.lm!r} has two sizes, {_format(sizes[row.lm])} and {_format(row.lm_params)}; give one "
                "language model one size, and two different names in the column lm."
            )


def _format(value: Number | str | bool | None) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
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
    files.write_whole(path, text.getvalue())


def append(path: str | os.PathLike[str], rows: Iterable[Row]) -> list[Row]:
    """Adds rows to a table that may not exist yet; a row whose key is there already takes its place.

    Calling it twice with the same rows leaves the same file. Returns the whole table.
    """
    merged = {row.key: row for row in read(path)} if to_path(path).is_file() else {}
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
        groups.setdefault(dataclasses.replace(row, benchmark="").key, []).append(row)
    means = []
    for (_, _, lm, tokens, _, seed, *_), group in groups.items():
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


def held_out(rows: Sequence[Row]) -> list[Row]:
    """A row per training with its held-out loss, in nats, in place of an error.

    Raises ConfigError when no row has one.
    """
    found = {}
    for row in rows:
        if row.validation_loss is not None:
            loss = dataclasses.replace(
                row, error=row.validation_loss, benchmark=VALIDATION_LOSS, family=VALIDATION_LOSS, n=None
            )  # fmt: skip
            found.setdefault(loss.key, loss)
    if not found:
        raise ConfigError(
            "fit: no row has a validation_loss; a sweep writes it where its config sets train.validation."
        )
    return list(found.values())


def counted(rows: Sequence[Row], size: str) -> list[Row]:
    """The rows with lm_params counted in this way; raises ConfigError for an LM that is no preset (but for "given")."""
    if size == GIVEN:
        return list(rows)
    params = {lm: _params(lm, size) for lm in dict.fromkeys(row.lm for row in rows)}
    return [dataclasses.replace(row, lm_params=params[row.lm]) for row in rows]


def _params(lm: str, size: str) -> Number:
    if lm not in presets.LM:
        raise ConfigError(
            f"fit: --size={size} needs presets, and lm {lm!r} is none; name one of {', '.join(presets.LM)} or use --size={GIVEN}."
        )
    params = COUNTS[size](presets.lm(lm))
    if not params:
        raise ConfigError(
            f"fit: preset {lm!r} has no {size} size; use --size=total, non-embedding or {GIVEN}."
        )
    return params
