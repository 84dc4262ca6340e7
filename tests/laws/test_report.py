"""The report: every number of the table, its doubts, pictures beside it, nothing fetched."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tables

from vlm_jax.laws import fitting, words
from vlm_jax.laws.report import Picture, constants_table, error_table, write_report
from vlm_jax.settings.checks import ConfigError

CAVEATS = ("It shows <the order>, not the ratio.",)
NOTES = ("middle, V = 4, seed 1: far above its neighbours, run again.",)
MADE_BY = "python -m x --y='1'"


def written(path, rows, fits, **options):
    return write_report(path, rows, fits, title="A & B", made_by=MADE_BY, text_tokens=10, budget_gflops=0.005, query_aware=["quecc"], **options)  # fmt: skip


@pytest.fixture(scope="module")
def fits():
    return fitting.fit_table(tables.rows(), draws=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fits):
    path = tmp_path_factory.mktemp("report")
    page = written(path, tables.rows(), fits, notes=NOTES, caveats=CAVEATS, seconds={"cells": 12.4, "law": 3.0})  # fmt: skip
    assert page == path / "report.html"
    return path


def test_it_opens_with_the_answer_and_its_two_figures(folder, fits):
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    said = words.of_exponents(fits)
    assert markdown.startswith(f"# A & B\n\n- {said}\n- Within 0.005 GFLOPs ")
    first = [markdown.index(word) for word in ("- Looking at", "![Reasoning", "![OCR", "## Errors")]
    assert first == sorted(first)
    assert re.findall(r'(?:<h\d>|<section>|src="[^"]*")', page)[:4] == [
        "<h1>", "<section>", 'src="errors_reasoning.png"', 'src="errors_ocr.png"'
    ]  # fmt: skip
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == [
        "Errors", "Constants of the law", "The plan", "What looking at the question buys", "What this does not show",
        "How it was made",
    ]  # fmt: skip


def test_one_seed_has_the_binomial_interval_of_its_questions():
    rows = tables.rows(seeds=(0,))
    table = error_table(rows, fitting.fit_family(rows, "ocr", draws=200))
    low, high = words.binomial_interval(0.594, 3200)
    assert table.rows[0][1] == f"0.594 ({low:.3f}–{high:.3f})"
    without = [dataclasses.replace(row, n=None) for row in rows]
    assert error_table(without, fitting.fit_family(without, "ocr", draws=200)).rows[0][1] == "0.594"


def test_constants_stand_with_their_intervals_and_r2(fits):
    table = constants_table(fits)
    lines = {line[0]: line for line in table.rows}
    found = fits["ocr"]
    low, high = found.profile["beta"]
    assert lines["OCR beta"][1:3] == [f"{found.law.beta:.3g}", f"{low:.3g}..{high:.3g}"]
    assert lines["OCR R2"][1] == f"{found.r2:.3f}"
    assert table.header[-1] == "fit at D = 0" and "OCR D" in lines
    fixed = constants_table(
        {"ocr": fitting.fit_family(tables.rows(), "ocr", fixed_d=0.0, draws=200)}
    )
    assert len(fixed.header) == 4 and "OCR D" not in {line[0] for line in fixed.rows}


def test_notes_stand_below_the_tables_of_errors(folder):
    markdown = (folder / "report.md").read_text()
    assert f"- {NOTES[0]}\n\n## Constants" in markdown
    assert f"<li>{NOTES[0]}</li>" in (folder / "report.html").read_text()


def test_an_elastic_law_stands_beside_the_law_of_the_cells(tmp_path, fits):
    """The elastic model's rows lie a tenth above the cells'; they are no compressor that looks at the question."""
    rows = tables.rows()
    more = [
        dataclasses.replace(row, compressor="mqt", elastic=True, error=row.error * 1.1)
        for row in rows
        if row.compressor == "tokenpacker" and not row.flag
    ]
    elastic = fitting.fit_table([*rows, *more], compressor="mqt", fixed_d=0.0, draws=100)
    written(tmp_path, [*rows, *more], fits, others=[elastic])
    text = (tmp_path / "report.md").read_text()
    section = text[text.index("## Laws side by side") : text.index("## How it was made")]
    assert "| constant | tokenpacker | mqt, one training per LM |" in section
    assert "10 trainings instead of 37; " in section  # 12 cells or 3 LMs of 3 seeds, and one more
    assert "the order of the exponents is the same for reasoning and the same for OCR." in section
    for name in ("A", "alpha", "beta", "alpha/beta"):
        own, other = (words.value(f["ocr"], name) for f in (fits, elastic))
        assert f"| OCR {name} | {own} | {other} |" in section
    assert "| small (40k) | 0.660 (0.653–0.667) |" in section
    assert "mqt" not in text[: text.index("## Laws side by side")]


def test_pictures_stand_below_what_looking_buys_and_must_be_there(tmp_path, fits):
    shown = [Picture("map.png", "asked for <d5>")]
    with pytest.raises(ConfigError, match=r"report: the picture map\.png is not in "):
        written(tmp_path, tables.rows(), fits, pictures=shown)
    (tmp_path / "map.png").write_bytes(b"")
    page = written(tmp_path, tables.rows(), fits, pictures=shown).read_text()
    after = page[page.index("What looking at the question buys</h2>") :]
    assert 'src="map.png"' in after and "asked for &lt;d5&gt;" in after


def test_a_budget_that_buys_nothing_is_said(tmp_path, fits):
    write_report(tmp_path, tables.rows(), fits, title="t", made_by="m", text_tokens=10, budget_gflops=1e-6)  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "- The budget buys none of the measured models." in text
    assert "- OCR: 1e-06 GFLOPs buy nothing; the cheapest candidate, small with 1 " in text


def test_every_table_scrolls_in_its_own_box(folder):
    page = (folder / "report.html").read_text()
    assert page.count("<table>") == page.count("<div class=wide><table>") == 6
    assert 'name="viewport" content="width=device-width' in page


def test_cells_show_mean_and_range_over_seeds_and_the_flag(folder):
    rows = tables.rows()
    table = error_table(rows, fitting.fit_family(rows, "ocr", draws=200))
    assert table.header == ["LM", "V = 1", "V = 4", "V = 16", "V = 64"]
    assert [line[0] for line in table.rows] == ["small (40k)", "middle (80k)", "large (240k)"]
    assert table.rows[0][1] == "0.600 (0.594–0.606)"
    text = (folder / "report.md").read_text()
    assert table.rows[1][3] == "0.150 (0.148–0.151)†" and table.rows[1][3] in text  # without 0.951
    assert sum("†" in cell for line in table.rows for cell in line) == 1


def test_both_forms_hold_the_same_words_pictures_and_command(folder):
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (folder / name).stat().st_size > 10_000 and f'src="{name}"' in page
    assert markdown.count("![") == page.count("<img") == 4
    assert "    python -m x --y='1'" in markdown and "python -m x --y=&#x27;1&#x27;" in page
    assert "A &amp; B" in page and "It shows &lt;the order&gt;" in page and CAVEATS[0] in markdown
    assert "quecc 0.123" in markdown and "15 seconds together" in markdown


def test_the_page_is_well_formed_and_fetches_nothing(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"(https?:)?//", page)
    open_tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("img", "meta", "!doctype"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(page)
    assert open_tags == []


def test_a_flagged_run_is_not_averaged_into_the_law(folder):
    rows = tables.rows()
    clean = [r for r in rows if not r.flag]
    a, b = (fitting.fit_family(r, "ocr", draws=200).law for r in (rows, clean))
    np.testing.assert_allclose((a.A, a.alpha, a.beta, a.D), (b.A, b.alpha, b.beta, b.D))
