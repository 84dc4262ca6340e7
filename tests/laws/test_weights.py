"""Weights and robust loss: the same optimum as scipy's on the same problem, and an outlier moves the law less."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import least_squares

from vlm_jax.laws import fitting
from vlm_jax.laws.fitting import binomial, huber, select
from vlm_jax.laws.law import Law
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

TRUE = Law(0.6, 0.2, 0.1, 0.0)
SIZES, TOKENS = (0.5e9, 1.8e9, 4e9, 7e9), (1, 4, 16, 64, 576)
BOUNDS = ([0, -5, -5, 0], [np.inf, 5, 5, np.inf])


def rows(seed=0, noise=0.004):
    rng = np.random.default_rng(seed)
    return [
        Row(n, v, float(TRUE.error(n, v)) + rng.normal(0, noise), lm=f"{n:g}", n=2 * int(rng.integers(25, 2500)))
        for n in SIZES for v in TOKENS
    ]  # fmt: skip


def scipys(points, scale, loss="linear", f_scale=1.0):
    def residual(c):
        return scale * (points.errors - Law(*c).error(points.size * 1e9, points.tokens))

    start = [0.5, 0.1, 0.1, 0.01]
    return least_squares(
        residual, start, bounds=BOUNDS, loss=loss, f_scale=f_scale, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=10000
    )  # fmt: skip


def test_binomial_weights_give_scipys_weighted_optimum():
    table = rows()
    found = fitting.fit_family(table, "all", draws=100, weights="binomial")
    n, e = (np.array([getattr(r, k) for r in table], float) for k in ("n", "error"))
    p = (e * n + 0.5) / (n + 1)
    weights = n / (p * (1 - p))
    weights /= weights.mean()
    points = select(table, "all", None, None, 4).points
    best = scipys(points, np.sqrt(weights))
    assert found.sse == pytest.approx(2 * best.cost, rel=1e-7)
    np.testing.assert_allclose(dataclasses.astuple(found.law), best.x, atol=2e-5)
    even = fitting.fit_family(table, "all", draws=100)
    assert abs(found.law.alpha - even.law.alpha) > 1e-3  # the weights matter here


def test_a_cell_of_two_seeds_weighs_as_much_as_all_its_questions():
    whole = rows()
    split = [
        dataclasses.replace(r, n=r.n // 2, seed=seed) if r.lm == "4e+09" else r
        for r in whole for seed in ((0, 1) if r.lm == "4e+09" else (0,))
    ]  # fmt: skip
    once, twice = (binomial(select(t, "all", None, None, 4)).cell_weights for t in (whole, split))
    np.testing.assert_allclose(once, twice, rtol=0.05)  # halves of a small n are smoothed more


def test_binomial_weights_without_n_are_refused():
    table = rows()
    table[3] = dataclasses.replace(table[3], n=None)
    with pytest.raises(ConfigError, match=r"5e\+08, 64 visual tokens, seed 0 has none"):
        fitting.fit_family(table, "all", draws=100, weights="binomial")


def with_outlier():
    table = rows(noise=0.002)
    return [dataclasses.replace(r, error=r.error + 0.15) if i == 19 else r for i, r in enumerate(table)]  # fmt: skip


def test_an_outlier_moves_the_robust_law_less_and_is_named():
    plain, robust = (
        fitting.fit_family(with_outlier(), "all", draws=100, loss=loss)
        for loss in ("squares", "huber")
    )
    assert abs(plain.law.alpha - 0.2) > 4 * abs(robust.law.alpha - 0.2)
    assert robust.down_weighted[0].startswith("7e+09, 576 visual tokens")
    assert any("the robust loss counts these cells less: 7e+09" in s for s in robust.statements)
    assert not plain.down_weighted


@pytest.mark.parametrize("lms", [("5e+08", "1.8e+09", "4e+09", "7e+09"), ("5e+08", "7e+09")])
def test_the_robust_law_is_scipys_huber_optimum(lms):
    """Residuals of n cells about a law of 4 constants are smaller than the noise by sqrt((n - 4) / n)."""
    cells = select([r for r in with_outlier() if r.lm in lms], "all", None, None, 4)
    points = cells.points
    off = np.abs(points.errors - points.law().error(points.size * 1e9, points.tokens))
    scale = 1.4826 * np.median(off) * np.sqrt(len(off) / (len(off) - 4))
    best = scipys(points, 1.0, "huber", 1.345 * scale)
    found = huber(cells, None).points.law()
    np.testing.assert_allclose(dataclasses.astuple(found), best.x, atol=3e-5)


def test_a_table_without_residuals_keeps_its_weights():
    exact = [dataclasses.replace(r, error=0.5) for r in rows()]
    found = fitting.fit_family(exact, "all", draws=100, loss="huber")
    assert found.law.alpha == pytest.approx(0, abs=1e-6) and not found.down_weighted
