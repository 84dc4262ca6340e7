"""Profile likelihoods: the same ends as a general optimiser's, flat directions followed, given exponents judged."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from vlm_jax.laws import fitting, table
from vlm_jax.laws.fitting import select
from vlm_jax.laws.law import Law
from vlm_jax.laws.least_squares import solve
from vlm_jax.laws.table import Row
from vlm_jax.laws.uncertainty import profile, run_variance

DATA = Path(table.__file__).parent / "data"
SIZES, TOKENS = (0.5e9, 1.8e9, 4e9, 7e9), (1, 4, 16, 36, 64, 144, 576)


def paper(family):
    return select(table.read(DATA / f"paper_{family}.csv"), family, None, None, 4)


def rows_of(law, noise, seeds=1, run_noise=0.0, rng_seed=0):
    rng = np.random.default_rng(rng_seed)
    run = rng.normal(0, run_noise, (len(SIZES), seeds))
    return [
        Row(n, v, float(law.error(n, v)) + run[i, s] + rng.normal(0, noise), lm=f"{n:g}", seed=s)
        for i, n in enumerate(SIZES) for v in TOKENS for s in range(seeds)
    ]  # fmt: skip


def least(points, held: dict[int, float], start) -> float:
    """The least sum of squares with some of (A, alpha, beta, D) held, by a general optimiser."""
    free = [i for i in range(4) if i not in held]

    def loss(given):
        c = np.zeros(4)
        c[free], c[list(held)] = given, list(held.values())
        predicted = c[0] * points.size ** -c[1] * points.tokens ** -c[2] + c[3]
        return 1e3 * np.sum((points.errors - predicted) ** 2)

    bounds = [(0, None), (-5, 5), (-5, 5), (0, None)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 50000}
    starts = [np.array(start), np.array([0.45, *start[1:3], 0.1])]
    return min(
        minimize(loss, s[free], method="L-BFGS-B", bounds=[bounds[i] for i in free], options=options).fun
        for s in starts
    ) / 1e3  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place", "outside"), [("A", 0, 0.7), ("alpha", 1, 0.05), ("beta", 2, 0.01)]
)
def test_a_profile_ends_where_a_general_optimiser_s_sum_of_squares_crosses_the_f_limit(
    name, place, outside
):
    cells = paper("reasoning")
    found = profile(cells, None)
    law = found.law
    limit = found.sse * (1 + f_distribution.ppf(0.95, 1, 24) / 24)
    best = (law.A, law.alpha, law.beta, law.D)
    crossing = brentq(
        lambda value: least(cells.points, {place: value}, best) - limit,
        *sorted((best[place], outside)), xtol=1e-6,
    )  # fmt: skip
    side = 0 if outside < best[place] else 1
    assert found.interval(name, 0.95)[side] == pytest.approx(crossing, rel=2e-3)


def test_the_published_d_is_not_identified_and_its_flat_direction_is_followed():
    found = fitting.fit_family(table.read(DATA / "paper_reasoning.csv"), "reasoning", draws=100)
    assert found.profile["D"][0] == 0 and found.profile["D"][1] == pytest.approx(0.141, abs=2e-3)
    assert found.profile["alpha"] == pytest.approx((0.0681, 0.0960), abs=5e-4)
    assert found.profile["alpha/beta"] == pytest.approx((4.25, 5.24), abs=0.03)
    low, high = found.d_profile["alpha/beta"]
    assert high - low < 0.01  # D moves alpha and beta together
    (line,) = (s for s in found.statements if "D is not identified" in s)
    assert (
        "any D in [0, 0.141]" in line
        and "alpha in [0.0681, 0.096]" in line
        and "ratio alpha/beta in [4.25, 5.24]" in line
    )


@pytest.mark.parametrize(
    ("family", "alpha", "beta", "inside", "ratio"),
    [
        ("reasoning", 0.077, 0.015, True, 1.153),
        ("ocr", 0.029, 0.048, True, 1.138),
        ("reasoning", 0.029, 0.048, False, 75.6),
        ("ocr", 0.077, 0.015, False, 14.8),
    ],
)
def test_the_papers_own_exponents_lie_in_their_family_s_joint_region_only(
    family, alpha, beta, inside, ratio
):
    rows = table.read(DATA / f"paper_{family}.csv")
    found = fitting.fit_family(rows, family, draws=100, check=(alpha, beta))
    assert found.check.inside == inside and found.check.sse_ratio == pytest.approx(ratio, rel=5e-3)
    points = paper(family).points
    power = points.size**-alpha * points.tokens**-beta
    design = np.stack([power, np.ones(28)], 1)
    sse = np.linalg.lstsq(design, points.errors, rcond=None)[1][0]  # A and D come out positive
    f = (sse / found.sse - 1) * 24 / 2
    assert found.check.f == pytest.approx(f, rel=1e-6)
    assert found.check.p == pytest.approx(f_distribution.sf(f, 2, 24), rel=1e-5)
    word = "inside" if inside else "outside"
    assert any(f"lie {word} the joint 95% region" in line for line in found.statements)


def test_a_negative_exponent_is_said_and_the_nonnegative_law_is_the_constrained_optimum():
    rows = rows_of(Law(0.3, 0.2, -0.05, 0.0), 0.003)
    found = fitting.fit_family(rows, "all", draws=100)
    assert found.law.beta < 0 and found.law_nonnegative.beta == 0
    points = select(rows, "all", None, None, 4).points
    best = least(points, {2: 0.0}, (0.3, 0.2, 0.0, 0.0))
    assert found.sse_nonnegative == pytest.approx(best, rel=1e-5)
    text = "\n".join(found.statements)
    assert "error rises with visual tokens" in text and "with alpha, beta >= 0 the law is" in text
    assert fitting.fit_family(rows_of(Law(0.5, 0.2, 0.1, 0), 0.003), "all", draws=100).law_nonnegative.beta > 0  # fmt: skip


def test_a_fixed_d_has_no_interval_and_narrows_alpha():
    rows = table.read(DATA / "paper_reasoning.csv")
    free, zero = (fitting.fit_family(rows, "reasoning", draws=100, fixed_d=d) for d in (None, 0.0))
    assert zero.profile["D"] is None
    wide, narrow = (np.diff(f.profile["alpha"])[0] for f in (free, zero))
    assert narrow < 0.4 * wide


def test_the_variance_of_a_run_is_found_beside_the_noise_of_single_measurements():
    law = Law(0.5, 0.2, 0.1, 0.0)
    found = [
        run_variance(select(rows_of(law, 0.004, 6, noise, rng), "all", None, None, 4))[0]
        for noise in (0.0, 0.01) for rng in range(12)
    ]  # fmt: skip
    assert np.mean(found[:12]) < 2e-6  # without runs' luck: about 0, not .004^2 / 7
    assert np.mean(found[12:]) == pytest.approx(1e-4, rel=0.25)


def test_what_all_cells_of_a_run_share_widens_alpha_more_than_beta():
    law = Law(0.5, 0.2, 0.1, 0.0)
    calm, lucky = (
        profile(select(rows_of(law, 0.003, 3, noise), "all", None, None, 4), None).effects
        for noise in (0.0, 0.01)
    )
    assert calm["alpha"].factor < 1.6
    assert lucky["alpha"].factor > 2 and lucky["alpha"].factor > lucky["beta"].factor
    assert lucky["alpha"].freedom < 24


def test_with_repeated_seeds_a_profile_is_as_wide_as_tables_drawn_again_scatter():
    law, noise, run_noise, seeds, again = Law(0.5, 0.2, 0.1, 0.0), 0.003, 0.006, 5, 400
    rng = np.random.default_rng(1)
    size, tokens = (
        a.ravel()
        for a in np.meshgrid(np.array(SIZES) / 1e9, np.array(TOKENS, float), indexing="ij")
    )
    run = np.repeat(rng.normal(0, run_noise, (again, len(SIZES))), len(TOKENS), axis=1)
    errors = law.error(size * 1e9, tokens) + run / np.sqrt(seeds)
    errors = errors + rng.normal(0, noise / np.sqrt(seeds), errors.shape)
    drawn = solve(size, tokens, errors, np.ones_like(errors), np.zeros(again))
    for name in ("alpha", "beta"):
        widths = []
        for i in range(12):
            rows = rows_of(law, noise, seeds, run_noise, i)
            found = profile(select(rows, "all", None, None, 3), 0.0)
            freedom = found.effects[name].freedom
            widths.append(np.diff(found.interval(name, 0.95))[0] / 2 / t_distribution.ppf(0.975, freedom))  # fmt: skip
        sd = np.sqrt(np.mean(np.square(widths)))
        assert 0.85 < sd / np.std(getattr(drawn, name)) < (1.25 if name == "alpha" else 3)
