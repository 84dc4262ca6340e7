"""The command `python -m vlm_jax.laws.plan`: its flags, its table, its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vlm_jax.costs.chips import CHIPS
from vlm_jax.costs.price import (
    UNITS,
    Budget,
    Number,
    Workload,
    allowed_tokens,
    choosable,
    exact_price,
    find_chip,
)
from vlm_jax.laws import choice, fitting, table
from vlm_jax.laws import law as law_file
from vlm_jax.laws.alternatives import LAW_FORMS, POWER
from vlm_jax.laws.choice import Plan
from vlm_jax.laws.law import Fit
from vlm_jax.laws.planning import PAPER, Method, choose
from vlm_jax.settings import cli, presets
from vlm_jax.settings.checks import ConfigError

WIDE = 110  # columns of a terminal from which on every known amount is shown


def _parser() -> cli.OneLineParser:
    parser = cli.OneLineParser(description="The best (LM, visual tokens) for a budget.")
    add = parser.add_argument
    add("--law", help="law.json made by vlm_jax.laws.fit")
    add("--table", help="errors.csv, instead of --law: fitted here")
    add("--family", help="of the law (default: every one)")
    add("--budget-gflops", type=float, help="forward GFLOPs of one question")
    add("--budget-ms", type=float, help="milliseconds until a batch is answered; needs --chip")
    add("--budget-dollars", type=float, help="dollars per million questions; needs --chip")
    add("--budget-gib", type=float, help="memory; alone, or beside another budget")
    add("--chip", help=f"{', '.join(c.name for c in CHIPS)}; its memory limits too")
    add("--chip-hour-dollars", type=float, help="what you pay for an hour of one chip")
    add("--batch", type=int, default=1, help="questions answered together (default 1)")
    add("--text-tokens", type=int, required=True, help="Q: prompt tokens beside the visual ones")
    add("--cached", action="store_true", help="the text's keys and values are cached")
    add("--output-tokens", type=int, default=0, help="answer tokens; the paper counts them with Q")
    add("--law-form", choices=LAW_FORMS, default=POWER, help="predict errors by another law of the same cells; supported: that of the least AICc")  # fmt: skip
    add("--lms", help="candidates: presets or NAME=PARAMS, comma-separated (default: measured)")
    add("--free-sizes", nargs="?", const="", metavar="LOW,HIGH", help="any size (default: between the measured)")  # fmt: skip
    add("--visual-tokens", help='candidates, comma-separated, or "all" the compressor can give')
    add("--exact", action="store_true", help="count encoder, compressor, attention and head too")
    add("--vit", default="clip-l-336", help="encoder preset of the exact count")
    add("--compressor", help="of the exact count (default: the law's)")
    add("--taps", default="", help="of the exact count: tapped hidden states, comma-separated")
    add("--plot", help="writes FILE.png or FILE.svg; {family} in the name is replaced")
    add("--json", action="store_true", help="print the plans as JSON")
    return parser


def _fits(args: Namespace) -> dict[str, Fit]:
    if (args.law is None) == (args.table is None):
        raise ConfigError("plan: give --law law.json or --table errors.csv, one of them.")
    if args.law:
        fits = law_file.load(args.law)
        families = list(fits)
    else:
        rows = table.read(args.table)
        families = list(dict.fromkeys(row.family for row in rows))
        fits = fitting.fit_table([row for row in rows if args.family in (None, row.family)])
    if args.family and args.family not in families:
        raise ConfigError(
            f"plan: family {args.family!r} is not in {args.law or args.table}; it has {families}."
        )
    return {args.family: fits[args.family]} if args.family else fits


def _budget(args: Namespace) -> Budget:
    limits = {kind: getattr(args, f"budget_{kind}") for kind in UNITS}
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    main = [kind for kind in given if kind != "gib"] or list(given)
    if len(main) != 1:
        flags = " and ".join(f"--budget-{kind}" for kind in main) or "none"
        raise ConfigError(
            f"plan: give one of --budget-gflops, --budget-ms, --budget-dollars, --budget-gib; got {flags} "
            "(--budget-gib may stand beside one other)."
        )
    kind = main[0]
    return Budget(
        kind,
        given[kind],
        find_chip(args.chip) if args.chip else None,
        args.chip_hour_dollars,
        given["gib"] if "gib" in given and kind != "gib" else None,
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    parts = [word for word in text.split(",") if word]
    if any(not word.strip().isdigit() for word in parts):
        raise ConfigError(f"plan: {flag} {text!r} is not a comma-separated list of whole numbers.")
    return tuple(int(word) for word in parts)


def _number(flag: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"plan: {flag}: {word!r} is not a number of parameters.") from None


def _lms(text: str | None) -> dict[str, Number] | None:
    """ "qwen1.5-7b,mine=3e9" -> name -> parameters; a preset counts by its nominal size, as the paper does."""
    if text is None:
        return None
    found: dict[str, Number] = {}
    for word in text.split(","):
        name, _, params = word.partition("=")
        if params:
            found[name] = _number("--lms", params)
        else:
            config = presets.lm(name)
            found[name] = config.nominal_params or config.non_embedding_params
    return found


def _free_sizes(text: str | None, fit: Fit) -> tuple[Number, Number] | None:
    if text is None:
        return None
    if not text:
        return min(fit.lms.values()), max(fit.lms.values())
    ends = text.split(",")
    if len(ends) != 2:
        raise ConfigError(f"plan: --free-sizes {text!r} is not LOW,HIGH in parameters.")
    low, high = (_number("--free-sizes", word) for word in ends)
    return low, high


def _plan(args: Namespace, fit: Fit, budget: Budget) -> Plan:
    lms, free = _lms(args.lms), _free_sizes(args.free_sizes, fit)
    if free and (lms or args.exact):
        raise ConfigError(
            "plan: --free-sizes goes with neither --lms nor --exact: it has no shapes."
        )
    compressor = args.compressor or fit.compressor
    if not compressor and (args.exact or args.visual_tokens == "all"):
        asking = "--exact" if args.exact else "--visual-tokens all"
        raise ConfigError(
            f"plan: {asking} needs to know the compressor, which the law's table does not name; add --compressor=NAME, one "
            f"of {', '.join(choosable())}."
        )
    exact = None
    known = (
        compressor in choosable() and not free and all(lm in presets.LM for lm in lms or fit.lms)
    )
    if args.exact or known:
        exact = Method(
            f"counted exactly (encoder {args.vit}, {compressor})",
            exact_price(args.vit, compressor, _numbers("--taps", args.taps)),
        )
    tokens = None
    if args.visual_tokens == "all":
        tokens = allowed_tokens(args.vit, compressor)
    elif args.visual_tokens is not None:
        tokens = _numbers("--visual-tokens", args.visual_tokens)
    return choose(
        fit,
        budget,
        Workload(args.text_tokens, args.cached, args.output_tokens, args.batch),
        lms=lms,
        visual_tokens=tokens,
        free_sizes=free,
        method=exact if args.exact and exact else PAPER,
        other=PAPER if args.exact else exact,
        law_form=args.law_form,
    )


def show(plan: Plan, console: Console) -> None:
    """Prints the answer, where its time goes, the runners-up and the frontier."""
    for line in plan.statements:
        console.print(line, highlight=False, markup=False)
    if plan.budget.chip or len(plan.phases) > 1:
        console.print(choice.phases_table(plan).on_terminal())
    console.print(choice.candidates_table(plan, console.width >= WIDE).on_terminal(left=2))
    if any(c.extrapolated for group in choice.shown(plan).values() for c in group):
        console.print("* outside the measured sizes or token counts", highlight=False)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything, for JSON."""
    fields: dict[str, Any] = dataclasses.asdict(plan)
    for name, kind in (("by_text_tokens", plan.by_text_tokens), ("instead", plan.instead)):
        fields[name] = [item._asdict() for item in kind]
    if not math.isfinite(plan.continuous_optimum):
        fields["continuous_optimum"] = None  # JSON has no infinity
    return fields


def _plot(plan: Plan, fit: Fit, path: str, count: int, console: Console) -> None:
    # Matplotlib takes longer to load than a plan takes to make.
    from vlm_jax.laws import drawing, figures

    if count > 1 and plan.family not in path:
        raise ConfigError(
            "plan: --plot draws one picture per family; put {family} in the name, or give --family."
        )
    drawing.save(figures.plan_figure(plan, fit), path)
    console.print(f"wrote {path}", highlight=False, markup=False)


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.plot and args.free_sizes is not None:
        raise ConfigError("plan: --plot draws given sizes; leave out --free-sizes.")
    budget = _budget(args)
    fits = _fits(args)
    plans = [_plan(args, fit, budget) for fit in fits.values()]
    if args.json:
        sys.stdout.write(json.dumps([as_dict(plan) for plan in plans], indent=1) + "\n")
        return
    console = Console()
    for plan in plans:
        show(plan, console)
        if args.plot:
            path = args.plot.replace("{family}", plan.family)
            _plot(plan, fits[plan.family], path, len(plans), console)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: 0, or 2 with one line on stderr."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
