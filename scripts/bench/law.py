#!/usr/bin/env python3
"""The law's fit: its time, the published procedure beside it, and how often its intervals cover the truth.

OMP_NUM_THREADS=1 scripts/bench/law.py [--seeds 5] [--laws 200] [--draws 400] [--more 1000] [--out docs/law_coverage.csv]

The published procedure is re-enacted from its description: a grid of A (50) x alpha (100) x beta (100) x D (10), shuffled
without a seed, the least sum of squares over a random 20 % of its points. Each round times both, ours right after it.

Coverage: random laws, tables drawn from them, and the share of 95 % intervals that hold the true constant. The laws:
alpha in [.03, .4] and beta in [.01, .2], both log-uniform; D = 0 for half of them, else uniform in [0, .3]; A + D uniform in
[.35, .9]; errors in [.03, .97]. Layout: the paper's, N = .5, 1.8, 4, 7 billion times V = 1, 4, 16, 36, 64, 144, 576. Noise:
normal; a table's standard deviation s is log-uniform in [.001, .01]. One seed: s per cell. Three seeds: s per measurement, s/2
per cell (a law that is not quite right) and r s per training run, shared by its cells, r uniform in [0, 1].
200 laws know a share of 95 % to +- 3 points. "profile, by definition" asks more laws, the first 200 among them, without
searching the interval's ends: is the sum of squares with the true constant held below the interval's limit?
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm_jax.laws import fitting, table
from vlm_jax.laws.fitting import select
from vlm_jax.laws.law import CONSTANTS, Law
from vlm_jax.laws.table import Row
from vlm_jax.laws.uncertainty import profile

DATA = Path(table.__file__).parent / "data"
SIZES = (0.5e9, 1.8e9, 4e9, 7e9)
TOKENS = (1, 4, 16, 36, 64, 144, 576)
GRID = (
    np.linspace(0.2, 0.7, 50),
    np.linspace(0, 0.2, 100),
    np.linspace(0, 0.05, 100),
    np.linspace(0, 0.3, 10),
)
CHUNK = 20_000  # grid points at once: 28 errors each, 4.5 MB per array
LEVELS = {1: "one seed", 3: "three seeds"}


def published(size, tokens, errors, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(A alpha beta D, sum of squares): the best of a random fifth of the grid."""
    shape = tuple(map(len, GRID))
    order = rng.permutation(np.prod(shape))
    best, least = np.zeros(4), np.inf
    log_n, log_v = np.log(size), np.log(tokens)
    for i in range(0, len(order) // 5, CHUNK):
        places = np.unravel_index(order[i : min(i + CHUNK, len(order) // 5)], shape)
        a, alpha, beta, d = (axis[place] for axis, place in zip(GRID, places, strict=True))
        power = np.exp(-alpha[:, None] * log_n - beta[:, None] * log_v)
        sums = np.sum((a[:, None] * power + d[:, None] - errors) ** 2, axis=1)
        if sums.min() < least:
            j = int(sums.argmin())
            best, least = np.array([a[j], alpha[j], beta[j], d[j]]), float(sums[j])
    return best, least


def seconds(call, repeats: int) -> float:
    """Median wall seconds of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speed(num_seeds: int) -> None:
    """Prints times and sums of squares on both published tables."""
    for family in ("reasoning", "ocr"):
        rows = table.read(DATA / f"paper_{family}.csv")
        points = select(rows, family, None, None, 4).points
        ours = points.sum_of_squares(points.law())
        whole = seconds(lambda f=family, r=rows: fitting.fit_family(r, f, draws=1000), 3)
        print(f"{family}: 28 cells; the law {1e3 * seconds(points.law, 20):.1f} ms; with 2 x 1,000 resamples (cells, residuals), profiles and other laws {whole:.2f} s")  # fmt: skip
        ratios, times, laws = [], [], []
        for seed in range(num_seeds):
            start = time.perf_counter()
            law, sse = published(points.size, points.tokens, points.errors, np.random.default_rng(seed))  # fmt: skip
            spent = time.perf_counter() - start
            times.append(spent / seconds(points.law, 20))
            ratios.append(sse / ours)
            laws.append(law)
        alpha, beta = np.array(laws)[:, 1], np.array(laws)[:, 2]
        print(
            f"{family}: published procedure, {num_seeds} seeds: {spent:.2f} s, {min(times):.0f} to {max(times):.0f} times ours; "
            f"sum of squares {min(ratios):.3f} to {max(ratios):.3f} of ours ({ours:.3e}); alpha {alpha.min():.4f} to "
            f"{alpha.max():.4f}, beta {beta.min():.4f} to {beta.max():.4f}, alpha/beta {(alpha / beta).min():.2f} to {(alpha / beta).max():.2f}"
        )  # fmt: skip


def random_law(rng: np.random.Generator) -> Law:
    while True:
        d = rng.uniform(0, 0.3) * rng.integers(2)
        alpha, beta = (float(np.exp(rng.uniform(*np.log(r)))) for r in ((0.03, 0.4), (0.01, 0.2)))
        law = Law(float(rng.uniform(0.35, 0.9) - d), alpha, beta, float(d))
        errors = law.error(np.array(SIZES)[:, None], np.array(TOKENS))
        if law.A > 0 and errors.min() >= 0.03 and errors.max() <= 0.97:
            return law


def noisy_table(law: Law, num_seeds: int, rng: np.random.Generator) -> list[Row]:
    s = float(np.exp(rng.uniform(*np.log((0.001, 0.01)))))
    several = num_seeds > 1
    run = rng.normal(0, s * rng.uniform(0, 1) * several, (len(SIZES), num_seeds))
    rows = []
    for i, size in enumerate(SIZES):
        for v in TOKENS:
            off = rng.normal(0, s / 2 if several else s)
            for seed in range(num_seeds):
                each = run[i, seed] + rng.normal(0, s) * several
                error = float(np.clip(law.error(size, v) + off + each, 0, 1))
                rows.append(Row(size, v, error, lm=f"{size:g}", seed=seed))
    return rows


def coverage(num_seeds: int, num_laws: int, draws: int) -> list[dict[str, str]]:
    """Per kind of interval and constant: the share that holds the truth, and the median width."""
    held: dict[tuple[str, str], list[bool]] = {}
    widths: dict[tuple[str, str], list[float]] = {}
    for i in range(num_laws):
        rng = np.random.default_rng([num_seeds, i])
        law = random_law(rng)
        found = fitting.fit_family(noisy_table(law, num_seeds, rng), "all", draws=draws)
        for kind, spans in {"profile": found.profile, **found.intervals}.items():
            for name in CONSTANTS:
                truth, span = law.ratio if name == "alpha/beta" else getattr(law, name), spans[name]
                if span is None:
                    continue
                held.setdefault((kind, name), []).append(span[0] <= truth <= span[1])
                widths.setdefault((kind, name), []).append(span[1] - span[0])
    return [
        {
            "table": LEVELS[num_seeds], "interval": kind, "constant": name, "intervals": str(len(hits)),
            "covered_percent": f"{100 * np.mean(hits):.1f}", "median_width": f"{np.median(widths[kind, name]):.3g}",
        }
        for (kind, name), hits in held.items()
    ]  # fmt: skip


def by_definition(num_seeds: int, num_laws: int) -> list[dict[str, str]]:
    """The profile's coverage without its intervals' ends, which cost most of its time."""
    held: dict[str, list[bool]] = {name: [] for name in CONSTANTS}
    for i in range(num_laws):
        rng = np.random.default_rng([num_seeds, i])
        law = random_law(rng)
        found = profile(select(noisy_table(law, num_seeds, rng), "all", None, None, 4), None)
        for name in CONSTANTS:
            truth = law.ratio if name == "alpha/beta" else getattr(law, name)
            sse = found.hold(name, np.array([truth])).sse[0]
            held[name].append(bool(sse <= found.limit(name, 0.95)))
    return [
        {
            "table": LEVELS[num_seeds], "interval": "profile, by definition", "constant": name, "intervals": str(num_laws),
            "covered_percent": f"{100 * np.mean(hits):.1f}", "median_width": "",
        }
        for name, hits in held.items()
    ]  # fmt: skip


def write(path: str, rows: list[dict[str, str]], args: argparse.Namespace) -> None:
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        file.write(f"# OMP_NUM_THREADS=1 scripts/bench/law.py --laws {args.laws} --draws {args.draws} --more {args.more} --out {args.out}\n")  # fmt: skip
        file.write("# Random laws, 95 % intervals; what was drawn, and how, is in that script's docstring.\n")  # fmt: skip
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="of the published procedure (default: %(default)s)")  # fmt: skip
    parser.add_argument("--laws", type=int, default=200, help="per layout; 0: speed alone (default: %(default)s)")  # fmt: skip
    parser.add_argument("--draws", type=int, default=400, help="bootstrap resamples per law (default: %(default)s)")  # fmt: skip
    parser.add_argument("--more", type=int, default=1000, help="laws per layout for the profile by definition (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", help="where the coverage goes as CSV (default: nowhere)")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, NumPy {np.__version__}")  # fmt: skip
    speed(args.seeds)
    if not args.laws:
        return 0
    rows = [
        row
        for n in LEVELS
        for row in by_definition(n, args.more) + coverage(n, args.laws, args.draws)
    ]
    for row in rows:
        print("  ".join(f"{value:<15}" for value in row.values()))
    if args.out:
        write(args.out, rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
