"""The command `python -m vlm_jax.laws.fit errors.csv --out law.json`: its flags, its tables, its JSON. See `fitting.py`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vlm_jax.files import can_hold, to_path
from vlm_jax.laws import law as law_file
from vlm_jax.laws import questions, table, words
from vlm_jax.laws.fitting import LOSSES, WEIGHTS, fit_family, fit_table
from vlm_jax.laws.law import Fit
from vlm_jax.laws.least_squares import EXPONENT_BOX
from vlm_jax.laws.table import GIVEN, SIZES, counted
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.OneLineParser(description="Fits error = A / (N^alpha V^beta) + D per family.")
    # fmt: off
    add = parser.add_argument
    add("tables", nargs="+", metavar="errors.csv", help="one, or several that are fitted together; lm_params, visual_tokens and error are enough")
    add("--out", help="where law.json goes (default: nowhere)")
    add("--family", help="fit this family only (default: every family)")
    add("--benchmark", help="fit this benchmark, or the mean over several, comma-separated, or validation_loss, the held-out loss (default: the mean over the family's)")
    add("--compressor", help="fit this compressor's rows (default: the one with the most)")
    add("--elastic", choices=table.ELASTIC, help="fit rows of trainings that each served several token counts, or of the others (default: the kind with the most)")
    add("--fix-d", type=float, help="fix D, for example at 0 (default: fitted, D >= 0)")
    add("--size", choices=SIZES, default=GIVEN, help="what N counts; all but given need lm to be a preset (default: %(default)s, column lm_params)")
    add("--weights", choices=WEIGHTS, default="even", help="of cells; binomial: by column n (default: %(default)s)")
    add("--loss", choices=LOSSES, default="squares", help="huber: outliers count less (default: %(default)s)")
    add("--text-tokens", type=int, metavar="Q", help="compare the law in Q + V too (default: not compared)")
    add("--questions", nargs="+", metavar="questions.jsonl", help="of evaluations: intervals over the questions that were asked (default: none)")
    add("--check", metavar="alpha=X,beta=Y", help="are these exponents inside the joint region? (default: not asked)")
    add("--level", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add("--draws", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    add("--json", action="store_true", help="print law.json instead of tables (default: tables)")
    # fmt: on
    return parser.parse_args(argv)


def _exponents(text: str) -> tuple[float, float]:
    """ "alpha=.077,beta=.015" -> (0.077, 0.015)."""
    parts = (part.partition("=") for part in text.replace(" ", "").split(","))
    given = {name: value for name, _, value in parts}
    try:
        alpha, beta = float(given.pop("alpha")), float(given.pop("beta"))
    except (KeyError, ValueError):
        alpha = beta = math.nan
    if given or not max(abs(alpha), abs(beta)) <= EXPONENT_BOX:
        raise ConfigError(
            f"fit: --check must be alpha=X,beta=Y with numbers up to {EXPONENT_BOX:g}; got {text!r}."
        )
    return alpha, beta


def show(fit: Fit, console: Console) -> None:
    """Prints one family's constants, the headline intervals (law.json has all), other laws and the statements."""
    compressor = f", {fit.trained}" if fit.compressor else ""
    console.print(
        f"{fit.family} ({fit.benchmark}{compressor}): {fit.num_cells} cells, {fit.num_seeds} seed(s), "
        f"R2 {fit.r2:.3f}, largest relative error {fit.max_relative_error:.1%}",
        style="bold", highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(words.constants_table(fit).on_terminal())
    console.print(words.alternatives_table(fit).on_terminal(caption=words.ABOUT_ALTERNATIVES))
    for line in fit.statements:
        console.print("- " + line, highlight=False, markup=False, soft_wrap=True)


def run(argv: Sequence[str]) -> None:
    args = _parse(argv)
    rows, benchmark = counted(table.read_all(args.tables), args.size), args.benchmark
    if benchmark == table.VALIDATION_LOSS:
        rows, benchmark = table.held_out(rows), None
    options: dict[str, Any] = {
        "benchmark": benchmark, "compressor": args.compressor, "elastic": table.ELASTIC.get(args.elastic), "fixed_d": args.fix_d,
        "level": args.level, "draws": args.draws, "seed": args.seed, "weights": args.weights, "loss": args.loss,
        "text_tokens": args.text_tokens, "check": None if args.check is None else _exponents(args.check),
    }  # fmt: skip
    made_by = law_file.provenance(
        ", ".join(args.tables),
        shlex.join(["python", "-m", "vlm_jax.laws.fit", *argv]),
        {**options, "size": args.size, "questions": args.questions},
    )
    options["without"] = None if args.questions is None else questions.read(args.questions)
    one = args.family
    fits = {one: fit_family(rows, one, **options)} if one else fit_table(rows, **options)
    if args.out:
        if not can_hold(to_path(args.out).resolve().parent):
            raise ConfigError(f"{args.out}: its folder does not exist; make it first.")
        law_file.save(args.out, fits, made_by)
    if args.json:
        sys.stdout.write(json.dumps(law_file.as_dict(fits, made_by), indent=1) + "\n")
        return
    console = Console()
    for fit in fits.values():
        show(fit, console)
    if args.out:
        console.print(f"wrote {args.out}", highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: 0, or 2 with one line on stderr."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
