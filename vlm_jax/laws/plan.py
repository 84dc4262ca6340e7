"""Given a law and an inference budget: which language model, how many visual tokens?

    python -m vlm_jax.laws.plan --law law.json --budget-gflops 500 --text-tokens 50

The cost of a question is the paper's 2 N (Q + V) (arXiv 2411.03312, section 3; answer tokens are counted with Q), or, with
--exact, every FLOP from the encoder to the last answer token.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vlm_jax import cli, presets
from vlm_jax.config import CompressorConfig, ConfigError, VLMConfig, with_tokens
from vlm_jax.laws import law as law_file
from vlm_jax.laws.fit import OneLineParser
from vlm_jax.laws.law import Fit
from vlm_jax.laws.table import Number, paper_flops

Cost = Callable[[str, Number, int], Number]  # (LM name, its parameters, visual tokens) -> FLOPs


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One (LM, visual tokens) with its cost and predicted error."""

    lm: str
    lm_params: Number
    visual_tokens: int
    flops: float
    error: float
    interval: tuple[float, float]  # of the error over the law's resamples, at the fit's level
    share: float  # of resamples in which this candidate is the best affordable one
    extrapolated: bool  # size or token count outside what was measured


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build for a budget, and how firmly the law says so."""

    family: str
    budget_flops: float
    text_tokens: int  # prompt tokens that cost compute, plus answer tokens
    cost: str  # how FLOPs were counted
    best: Candidate
    runners_up: tuple[Candidate, ...]  # the next affordable ones by predicted error
    frontier: tuple[
        Candidate, ...
    ]  # no other candidate is both cheaper and better; beyond the budget too
    candidates: tuple[Candidate, ...]  # all of them, cheapest first
    continuous_optimum: (
        float  # V* if LM size and V were free: Q beta / (alpha - beta); inf: as many as possible
    )

    @property
    def statements(self) -> list[str]:
        """The answer in words; one line each."""
        best, budget = self.best, self.budget_flops / 1e9
        lines = [
            f"{self.family}: within {budget:.4g} GFLOPs use {best.lm} with {best.visual_tokens} visual token(s): "
            f"predicted error {best.error:.3f} [{best.interval[0]:.3f}, {best.interval[1]:.3f}], "
            f"{best.flops / 1e9:.4g} GFLOPs; chosen in {best.share:.0%} of the law's resamples."
        ]
        optimum = self.continuous_optimum
        if math.isinf(optimum):
            lines.append(
                f"{self.family}: alpha <= beta, so at a fixed cost more visual tokens always beat a larger LM."
            )
        else:
            lines.append(
                f"{self.family}: with sizes free, V* = Q beta / (alpha - beta) = {optimum:.3g} at Q = {self.text_tokens} (cost 2 N (Q + V), any budget)."
            )
        if best.extrapolated:
            lines.append(
                f"{self.family}: the choice lies outside the measured sizes or token counts: an extrapolation."
            )
        return lines


def optimal_visual_tokens(alpha: float, beta: float, text_tokens: Number) -> float:
    """argmin over V of N^-alpha V^-beta at fixed cost N (Q + V): Q beta / (alpha - beta).

    inf when alpha <= beta (error falls with V all the way); 0 when beta <= 0 (tokens do not help: use the fewest).
    """
    if beta <= 0:
        return 0.0
    return text_tokens * beta / (alpha - beta) if alpha > beta else math.inf


def choose(
    fit: Fit,
    budget_flops: Number,
    text_tokens: int,
    *,
    lms: Mapping[str, Number] | None = None,
    visual_tokens: Sequence[int] | None = None,
    cost: Cost | None = None,
    cost_name: str = "2 N (Q + V)",
    runners_up: int = 4,
) -> Plan:
    """The candidate of least predicted error whose cost is within the budget; of equals the cheapest.

    Args:
      text_tokens: Q; 0 when the prompt's keys and values are cached.
      lms, visual_tokens: candidates; None takes those the law was measured on.
      cost: None counts 2 N (Q + V).
    """
    if budget_flops <= 0 or text_tokens < 0:
        raise ConfigError(
            f"plan: the budget must be positive and text_tokens >= 0; got {budget_flops:g} and {text_tokens}."
        )
    lms = fit.lms if lms is None else lms
    counts = fit.visual_tokens if visual_tokens is None else visual_tokens
    price = cost or (lambda _, params, tokens: paper_flops(params, text_tokens, tokens))
    table = sorted(
        (float(price(lm, params, tokens)), lm, params, tokens)
        for lm, params in lms.items()
        for tokens in sorted(set(counts))
    )
    if not table:
        raise ConfigError("plan: no candidates; give at least one LM and one visual token count.")
    flops, names, params, tokens = (list(column) for column in zip(*table, strict=True))
    affordable = sum(f <= budget_flops for f in flops)  # cheapest first
    if not affordable:
        raise ConfigError(
            f"plan: {budget_flops / 1e9:.4g} GFLOPs buy nothing; the cheapest candidate ({names[0]}, {tokens[0]} visual "
            f"tokens) costs {flops[0] / 1e9:.4g}: raise the budget or add a smaller LM."
        )
    errors = fit.law.error(np.array(params, float), np.array(tokens, float))
    drawn = _errors_of_resamples(fit, np.array(params, float), np.array(tokens, float))
    wins = np.bincount(drawn[:, :affordable].argmin(1), minlength=len(flops)) / len(drawn)
    tail = fit.tails[fit.mode]
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    sizes = fit.lms.values()
    found = [
        Candidate(
            names[i], params[i], tokens[i], flops[i], float(errors[i]), (float(low[i]), float(high[i])), float(wins[i]),
            not (min(sizes) <= params[i] <= max(sizes) and fit.visual_tokens[0] <= tokens[i] <= fit.visual_tokens[-1]),
        )
        for i in range(len(flops))
    ]  # fmt: skip
    ranked = sorted(found[:affordable], key=lambda c: (c.error, c.flops))
    return Plan(
        family=fit.family,
        budget_flops=float(budget_flops),
        text_tokens=text_tokens,
        cost=cost_name,
        best=ranked[0],
        runners_up=tuple(ranked[1 : 1 + runners_up]),
        frontier=tuple(_frontier(found)),
        candidates=tuple(found),
        continuous_optimum=optimal_visual_tokens(fit.law.alpha, fit.law.beta, text_tokens),
    )


def _errors_of_resamples(
    fit: Fit, params: np.ndarray, tokens: np.ndarray
) -> Float[np.ndarray, "R c"]:
    a, alpha, beta, d = (column[:, None] for column in fit.resamples.T)
    return a * (params / law_file.BILLION) ** -alpha * tokens**-beta + d


def _frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.flops, c.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return kept


def exact_cost(
    vit: str,
    compressor: str,
    *,
    text_tokens: int,
    cached_text_tokens: int = 0,
    output_tokens: int = 1,
    taps: tuple[int, ...] = (),
) -> Cost:
    """FLOPs from the encoder to the last answer token, for LMs that are presets."""
    from vlm_jax.laws import flops  # loads jax, which the other costs do not need

    encoder = presets.vit(vit)

    def cost(lm: str, _: Number, visual_tokens: int) -> Number:
        config = VLMConfig(
            encoder,
            with_tokens(CompressorConfig(compressor, taps=taps), encoder.grid, visual_tokens),
            presets.lm(lm),
        )
        return flops.forward_flops(
            config,
            text_tokens=text_tokens,
            cached_text_tokens=cached_text_tokens,
            output_tokens=output_tokens,
        ).total

    return cost


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vlm_jax.laws.plan", description="The best (LM, visual tokens) for a budget."
    )
    parser.add_argument("--law", required=True, help="law.json made by vlm_jax.laws.fit")
    parser.add_argument(
        "--budget-gflops", type=float, required=True, help="forward GFLOPs of one question"
    )
    parser.add_argument(
        "--text-tokens", type=int, required=True, help="Q: prompt tokens beside the visual ones"
    )
    parser.add_argument(
        "--cached",
        action="store_true",
        help="the prompt's keys and values are cached: Q costs nothing",
    )
    parser.add_argument(
        "--output-tokens", type=int, default=0, help="answer tokens, counted with Q"
    )
    parser.add_argument("--family", help="of law.json (default: every one)")
    parser.add_argument(
        "--lms",
        help="candidates: presets or NAME=PARAMS, comma-separated (default: the measured ones)",
    )
    parser.add_argument(
        "--visual-tokens", help="candidates, comma-separated (default: the measured ones)"
    )
    parser.add_argument(
        "--exact", action="store_true", help="count encoder, compressor, attention and head too"
    )
    parser.add_argument("--vit", default="clip-l-336", help="with --exact: encoder preset")
    parser.add_argument("--compressor", help="with --exact (default: the law's)")
    parser.add_argument(
        "--taps", default="", help="with --exact: tapped hidden states, comma-separated"
    )
    parser.add_argument(
        "--plot",
        help="writes the picture to FILE.png or FILE.svg; {family} in the name is replaced",
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    return parser


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word for word in text.split(",") if word]
    if any(not word.strip().isdigit() for word in words):
        raise ConfigError(f"plan: {flag} {text!r} is not a comma-separated list of whole numbers.")
    return tuple(int(word) for word in words)


def _lms(text: str | None) -> dict[str, Number] | None:
    """ "qwen1.5-7b,mine=3e9" -> name -> parameters; a preset counts by its nominal size, as the paper does."""
    if text is None:
        return None
    found: dict[str, Number] = {}
    for word in text.split(","):
        name, _, params = word.partition("=")
        if params:
            try:
                found[name] = float(params)
            except ValueError:
                raise ConfigError(
                    f"plan: --lms {word!r}: {params!r} is not a number of parameters."
                ) from None
        else:
            config = presets.lm(name)
            found[name] = config.nominal_params or config.non_embedding_params
    return found


def show(plan: Plan, console: Console) -> None:
    """Prints the answer, the runners-up and the frontier."""
    for line in plan.statements:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    grid = Table(box=SIMPLE, pad_edge=False)
    for name in ("", "LM", "tokens", "GFLOPs", "error", "interval", "chosen"):
        grid.add_column(name, justify="left" if name in ("", "LM") else "right", no_wrap=True)
    groups = {
        "best": [plan.best],
        "next": plan.runners_up,
        "frontier": _around(plan.frontier, plan.budget_flops),
    }
    for mark, group in groups.items():
        for i, c in enumerate(group):
            grid.add_row(*_cells(c, mark if i == 0 else "", plan), end_section=i == len(group) - 1)
    console.print(grid)
    if any(c.extrapolated for group in groups.values() for c in group):
        console.print("* outside the measured sizes or token counts", highlight=False)


def _around(
    frontier: Sequence[Candidate], budget: float, below: int = 4, above: int = 3
) -> list[Candidate]:
    """The part of the frontier near the budget; --json and --plot show all of it."""
    split = sum(c.flops <= budget for c in frontier)
    return list(frontier[max(0, split - below) : split + above])


def _cells(c: Candidate, mark: str, plan: Plan) -> list[str]:
    share = f"{c.share:.0%}" if c.flops <= plan.budget_flops else "too dear"
    return [
        mark, c.lm, str(c.visual_tokens), f"{c.flops / 1e9:.4g}", f"{c.error:.3f}" + ("*" if c.extrapolated else ""),
        f"{c.interval[0]:.3f}..{c.interval[1]:.3f}", share,
    ]  # fmt: skip


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    fits = law_file.load(args.law)
    if args.family and args.family not in fits:
        raise ConfigError(
            f"plan: family {args.family!r} is not in {args.law}; it has {sorted(fits)}."
        )
    lms, tokens = _lms(args.lms), _numbers("--visual-tokens", args.visual_tokens)
    costed = (0 if args.cached else args.text_tokens) + args.output_tokens
    plans = []
    for fit in [fits[args.family]] if args.family else fits.values():
        options: dict[str, Any] = {}
        if args.exact:
            options["cost_name"] = "every FLOP, encoder to answer"
            options["cost"] = exact_cost(
                args.vit, args.compressor or fit.compressor, text_tokens=args.text_tokens,
                cached_text_tokens=args.text_tokens if args.cached else 0,
                output_tokens=max(1, args.output_tokens), taps=_numbers("--taps", args.taps) or (),
            )  # fmt: skip
        plans.append(
            choose(fit, args.budget_gflops * 1e9, costed, lms=lms, visual_tokens=tokens, **options)
        )
    if args.json:
        sys.stdout.write(json.dumps([_as_dict(plan) for plan in plans], indent=1) + "\n")
        return
    console = Console()
    for plan in plans:
        show(plan, console)
        if args.plot:
            _plot(
                plan,
                fits[plan.family],
                args.plot.replace("{family}", plan.family),
                len(plans),
                console,
            )


def _as_dict(plan: Plan) -> dict[str, Any]:
    fields: dict[str, Any] = dataclasses.asdict(plan)
    if math.isinf(plan.continuous_optimum):
        fields["continuous_optimum"] = None  # JSON has no infinity
    return {**fields, "statements": plan.statements}


def _plot(plan: Plan, fit: Fit, path: str, count: int, console: Console) -> None:
    from vlm_jax.laws import plot  # matplotlib takes longer to load than a plan takes to make

    if count > 1 and plan.family not in path:
        raise ConfigError(
            "plan: --plot draws one picture per family; put {family} in the name, or give --family."
        )
    plot.save(plot.plan_figure(plan, fit), path)
    console.print(f"wrote {path}", highlight=False, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry: 0, or 2 with one line on stderr."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
