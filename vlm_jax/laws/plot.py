"""The command `python -m vlm_jax.laws.plot`: every figure that a table of errors supports."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from matplotlib.figure import Figure

from vlm_jax.files import to_path
from vlm_jax.laws import drawing, figures, fitting, table
from vlm_jax.laws import law as law_file
from vlm_jax.laws.law import Fit, rows_of
from vlm_jax.laws.table import Row
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

Named = tuple[str, Callable[[], Figure]]  # a file's name without its suffix, and what draws it


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of whole numbers, such as 0,50"
        )
    return sorted({int(word) for word in words})


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _parser() -> cli.OneLineParser:
    parser = cli.OneLineParser(description="Draws what a table of errors supports.")
    add = parser.add_argument
    # fmt: off
    add("tables", nargs="+", metavar="errors.csv", help="one table, or several that make one")
    add("--out", required=True, metavar="DIR", help="where the pictures go; made if it is not there")
    add("--law", help="law.json of this table (default: fitted here)")
    add("--text-tokens", type=_counts, default=[0, 50], metavar="Q,..", help="prompt tokens beside the visual ones (default: 0,50)")
    add("--extrapolate-to", type=_positive, metavar="PARAMS", help="read the law off at this LM size too, such as 14e9 (default: the largest measured)")
    add("--budget-gflops", type=_positive, help="compared at this cost (default: the one about which most LMs have a cell)")
    # fmt: on
    return parser


def _fits(args: Namespace, rows: Sequence[Row]) -> tuple[dict[str, Fit], list[str]]:
    """The law per family, and a line for each family that has none."""
    families = list(dict.fromkeys(row.family for row in rows))
    if args.law:
        fits = law_file.load(args.law)
        for fit in fits.values():
            _check_made_of(fit, rows, args.law)
        missing = [family for family in families if family not in fits]
        return fits, [f"family {family!r}: {args.law} has no law of it" for family in missing]
    fits, left_out = {}, []
    for family in families:
        try:
            fits[family] = fitting.fit_family(rows, family)
        except ConfigError as error:
            left_out.append(f"family {family!r}: {error}")
    return fits, left_out


def _check_made_of(fit: Fit, rows: Sequence[Row], path: str) -> None:
    """Raises ConfigError when a law was fitted to other cells than the table has."""
    means = table.family_mean(rows_of(rows, fit), fit.family)
    cells = {row.cell for row in means if not row.flag}
    if len(cells) != fit.num_cells or {lm for lm, _ in cells} != set(fit.lms):
        raise ConfigError(
            f"plot: {path} was fitted to {fit.num_cells} cells of family {fit.family!r} and the table has {len(cells)}; "
            "fit this table, or leave out --law."
        )


def _as_fitted(rows: Sequence[Row], fits: dict[str, Fit]) -> list[Row]:
    """The rows of LMs that a law knows, with the sizes it was fitted with."""
    return [
        dataclasses.replace(row, lm_params=fits[row.family].lms[row.lm])
        for row in rows
        if row.family in fits and row.lm in fits[row.family].lms
    ]


def _figures(args: Namespace, rows: Sequence[Row], fits: dict[str, Fit]) -> Iterator[Named]:
    stems = {family: re.sub(r"[^\w.-]+", "_", family) for family in fits}
    if len(set(stems.values())) < len(stems):
        raise ConfigError(f"plot: families {list(stems)} give files of the same name; rename one.")
    flops = None if args.budget_gflops is None else args.budget_gflops * 1e9

    for family, fit in fits.items():
        name = stems[family]
        for q in args.text_tokens:
            yield f"{name}_q{q}", lambda fit=fit, q=q: figures.errors_figure(rows, fit, q)
        yield (
            f"{name}_extrapolation",
            lambda fit=fit: figures.extrapolation_figure(rows, fit, args.extrapolate_to),
        )
        yield f"{name}_text_tokens", lambda fit=fit: figures.text_tokens_figure(fit, flops)
    for q in args.text_tokens:
        yield f"equal_compute_q{q}", lambda q=q: figures.equal_compute_figure(rows, fits, q, flops)


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    rows = table.read_all(args.tables)
    fits, left_out = _fits(args, rows)
    if not fits:
        raise ConfigError(f"plot: nothing to draw: {left_out[0]}")
    rows = _as_fitted(rows, fits)
    folder = to_path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"plot: --out {args.out} is a file; give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"plot: --out {args.out} cannot be made: {error.strerror}.") from error
    for name, draw in _figures(args, rows, fits):
        try:
            figure = draw()
        except ConfigError as error:  # the table does not support it
            left_out.append(f"{name}: {error}")
            continue
        for path in drawing.save_both(figure, folder, name).values():
            sys.stdout.write(f"wrote {path}\n")
    for line in left_out:
        sys.stdout.write(f"left out {line}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: 0, or 2 with one line on stderr."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
