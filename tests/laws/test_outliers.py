"""Which cells are suspicious: those that rise above their neighbours by more than seeds and chance explain."""

import dataclasses
from pathlib import Path

import pytest

from vlm_jax.laws import outliers, table
from vlm_jax.laws.outliers import Try
from vlm_jax.laws.table import Row

LMS = {"mini-38k": 37696, "mini-52k": 51520, "mini-82k": 82240}


def row(lm: str, visual_tokens: int, error: float, n: int | None = 3200, **changes) -> Row:
    fields = {"benchmark": "mini_ocr", "family": "ocr", "compressor": "tokenpacker"} | changes
    return Row(LMS[lm], visual_tokens, error, lm=lm, n=n, **fields)


def grid(errors: dict[int, tuple[float, float, float]], **changes) -> list[Row]:
    """Visual tokens -> the errors of the three LMs."""
    return [row(lm, v, e, **changes) for v, es in errors.items() for lm, e in zip(LMS, es, strict=True)]  # fmt: skip


def found(rows) -> set:
    return {(rise.row.seed, rise.row.lm, rise.row.visual_tokens) for rise in outliers.rises(rows)}


def test_cells_on_a_plateau_are_found_although_none_is_at_chance():
    rows = grid({
        1: (0.60, 0.60, 0.60), 4: (0.386, 0.396, 0.514), 16: (0.21, 0.19, 0.21), 64: (0.022, 0.116, 0.516),
    })  # fmt: skip
    stuck = {(0, "mini-82k", 4), (0, "mini-82k", 64), (0, "mini-52k", 64)}
    assert found(rows) == stuck
    assert found(rows[::-1]) == stuck
    sentences = [rise.sentence for rise in outliers.rises(rows)]
    assert "mini_ocr error 0.516 is above the 0.022 of mini-38k with 64 visual tokens" in sentences


def test_of_three_seeds_only_the_plateau_that_is_there_is_found():
    rows = table.read(Path(__file__).with_name("plateau.csv"))
    assert found(rows) == {(2, "mini-82k", 16), (2, "mini-82k", 64)}


@pytest.mark.parametrize("name", ["ocr", "reasoning"])
def test_nothing_is_found_in_the_published_tables(name):
    assert not found(table.read(Path(table.__file__).parent / "data" / f"paper_{name}.csv"))


def test_a_rise_counts_where_it_is_large_relative_and_beyond_chance():
    def rise(low, high, n):
        return bool(found([row("mini-38k", 4, low, n), row("mini-82k", 4, high, n)]))

    assert not rise(0.01, 0.08, 3200)  # seven points of seed noise
    assert rise(0.01, 0.10, 3200)
    assert not rise(0.40, 0.50, 3200)  # a quarter more
    assert rise(0.40, 0.53, 3200)
    assert not rise(0.20, 0.32, 100) and rise(0.20, 0.32, 1000)
    assert rise(0.20, 0.32, None)  # unknown n: no chance is reckoned with


def test_a_slow_rise_with_visual_tokens_is_a_trend():
    rows = [row("mini-52k", v, e) for v, e in ((1, 0.28), (4, 0.33), (16, 0.37), (64, 0.42))]
    assert not found(rows)
    assert found([rows[0], rows[3]]) == {(0, "mini-52k", 64)}  # in one step it is none


def test_benchmarks_compressors_and_seeds_are_not_compared_and_flagged_rows_do_not_judge():
    low, high = row("mini-38k", 4, 0.1), row("mini-82k", 4, 0.5)
    assert found([low, high])
    for change in (
        {"benchmark": "other"},
        {"compressor": "quecc"},
        {"seed": 1},
        {"flag": "chance level"},
    ):
        assert not found([low, dataclasses.replace(high, **change)])
        assert not found([dataclasses.replace(low, **change), high])


def test_a_plateau_of_the_smallest_lm_stands_above_the_line_between_its_neighbours():
    stuck = [row("mini-38k", v, e) for v, e in ((1, 0.52), (4, 0.513), (16, 0.15), (64, 0.08))]
    (rise,) = outliers.rises(stuck)
    assert rise.sentence == (
        "mini_ocr error 0.513 is above 0.335, the line from the 0.520 of mini-38k with 1 visual token to the 0.150 with 16"
    )
    late = [row("mini-38k", v, e) for v, e in ((1, 0.529), (4, 0.379), (16, 0.195), (64, 0.079))]
    to_nothing = [row("mini-38k", v, e) for v, e in ((1, 0.48), (4, 0.24), (16, 0.12), (64, 0.005))]
    assert not found(late) and not found(to_nothing)


def test_what_lies_beyond_a_suspicious_cell_is_judged_by_the_sound_one_before_it():
    rows = [row("mini-38k", v, e) for v, e in ((1, 0.3), (4, 0.6), (16, 0.55), (64, 0.35))]
    assert found(rows) == {(0, "mini-38k", 4), (0, "mini-38k", 16)}


def test_only_the_rows_out_of_line_are_flagged_and_every_try_is_told():
    fine = [row("mini-38k", 4, 0.1), row("mini-38k", 4, 0.3, benchmark="mini_reasoning")]
    odd = [row("mini-82k", 4, 0.5), row("mini-82k", 4, 0.2, benchmark="mini_reasoning")]
    tries = outliers.judged({"small": [Try(0, fine)], "large": [Try(0, odd)]})
    assert tries["small"] == [Try(0, fine)]
    (large,) = tries["large"]
    assert [r.flag for r in large.rows] == ["out of line", ""]
    again = {**tries, "large": [large, Try(1000, [row("mini-82k", 4, 0.08)])]}
    assert outliers.judged(again) == again
    assert outliers.stories(tries) == [
        "large, trained with seed 0: mini_ocr error 0.500 is above the 0.100 of mini-38k with 4 visual tokens, "
        "flagged and not fitted."
    ]
    assert outliers.stories(again) == [
        "large, trained with seed 0: mini_ocr error 0.500 is above the 0.100 of mini-38k with 4 visual tokens; "
        "seed 1000: mini_ocr 0.080, which counts."
    ]
