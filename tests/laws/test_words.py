"""The answer's intervals against scipy's, and its sentences against the fits and rows that they are made of."""

import dataclasses

import pytest
import tables
from scipy import stats

from vlm_jax.laws import choice, fit, planning, words
from vlm_jax.laws.table import Row
from vlm_jax.laws.words import Change, binomial_interval

OWN, OTHER = (0.30, 0.34, 0.31), (0.25, 0.28)


def runs(errors, n=3200, compressor="tokenpacker"):
    return [Row(80e3, 1, e, "mini_ocr", "ocr", "middle", compressor, n, i) for i, e in enumerate(errors)]  # fmt: skip


@pytest.fixture(scope="module")
def fits():
    return fit.fit_table(tables.rows(), fixed_d=0.0, draws=200)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (1600, 3200), (3200, 3200)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert binomial_interval(right / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_interval_of_a_change_is_students_over_seeds():
    change = Change(runs(OWN), runs(OTHER, compressor="quecc"))
    wanted = stats.ttest_ind(OTHER, OWN).confidence_interval()
    assert change.interval == pytest.approx((wanted.low, wanted.high))
    one = Change(runs(OWN), runs(OTHER[:1]))  # its spread is taken to be that of the other
    low, high = one.interval
    half = stats.t.ppf(0.975, 2) * stats.tstd(OWN) * (1 + 1 / 3) ** 0.5
    assert (low, high) == pytest.approx((one.mean - half, one.mean + half))


def test_with_one_run_each_the_questions_alone_give_the_interval():
    change = Change(runs([0.3]), runs([0.25], n=800))
    half = stats.norm.ppf(0.975) * (0.3 * 0.7 / 3200 + 0.25 * 0.75 / 800) ** 0.5
    assert change.interval == pytest.approx((-0.05 - half, -0.05 + half))
    assert Change(runs([0.3]), runs([0.25], n=None)).interval is None
    said = words.of_looking({"ocr": [change]})
    assert "lowers the OCR error (0.300 to 0.250: -0.050" in said and "one run each" in said


def test_a_flagged_run_is_not_in_the_change():
    failed = dataclasses.replace(runs([0.95])[0], seed=7, flag="chance level")
    with_it, without = (Change([*runs(OWN), *extra], runs(OTHER)) for extra in ([failed], []))
    assert with_it.mean == without.mean and with_it.interval == without.interval


def test_the_exponents_sentence_names_the_larger_one_of_each_family(fits):
    said = words.of_exponents(fits)
    for family, large, small in (("reasoning", "alpha", "beta"), ("ocr", "beta", "alpha")):
        values = [words.value(fits[family], name) for name in (large, small)]
        assert f"({large} = {values[0]}, {small} = {values[1]}, {large} > {small} in 100.0%" in said
        low, high = fits[family].profile[large]
        assert f"[{low:.3g}, {high:.3g}]" in values[0]
    assert said.startswith("Reasoning error falls faster with LM size than with visual tokens (")
    assert "; OCR error falls faster with visual tokens than with LM size (" in said


def test_an_order_that_resamples_do_not_settle_is_said_to_be_open(fits):
    found = fits["ocr"]
    unsure = dataclasses.replace(found, p_alpha_greater={found.mode: 0.3})
    said = words.of_exponents({"ocr": unsure})
    assert said.startswith("It is not settled what OCR error falls faster with (alpha = ")
    assert "alpha > beta in 30.0% of resamples" in said


def test_the_plans_sentence_has_the_choice_its_error_and_its_share(fits):
    plans = {family: planning.choose(fit, 5e6, 10) for family, fit in fits.items()}
    said = choice.of_plans(plans, 10)
    for plan in plans.values():
        low, high = plan.best.interval
        assert f"{plan.best.error:.3f} [{low:.3f}, {high:.3f}], the best in {plan.best.share:.0%}" in said  # fmt: skip
    assert said.startswith("Within 0.005 GFLOPs per question (10 text tokens) use middle with ")


def test_cells_beside_the_law_begin_with_the_fewest_tokens_and_the_largest_lm(fits):
    rows = tables.rows()
    quecc = next(row for row in rows if row.compressor == "quecc" and row.family == "ocr")
    more = [
        dataclasses.replace(quecc, lm="large", lm_params=240e3),
        dataclasses.replace(quecc, lm="large", lm_params=240e3, visual_tokens=4),
        dataclasses.replace(quecc, visual_tokens=9),  # the law has no such cell
        dataclasses.replace(quecc, compressor="mqt"),
    ]
    found = words.beside([*rows, *more], fits["ocr"], ["quecc"])
    assert [change.other[0].cell for change in found] == [("large", 1), ("middle", 1), ("large", 4)]
    own = [row.error for row in rows if row.family == "ocr" and row.cell == ("middle", 1)][:3]
    assert found[1].mean == pytest.approx(0.123 - sum(own) / 3)
