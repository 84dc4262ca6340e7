"""The report: every number of the table, its doubts, pictures beside it, nothing fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tables

from vlm_jax.laws import fit
from vlm_jax.laws.report import error_table, write_report

CAVEATS = ("It shows <the order>, not the ratio.",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    rows = tables.rows()
    page = write_report(
        path, rows, fit.fit_table(rows, draws=200), title="A & B", made_by="python -m x --y='1'", text_tokens=10,
        budget_gflops=0.005, caveats=CAVEATS, seconds={"cells": 12.4, "law": 3.0},
    )  # fmt: skip
    assert page == path / "report.html"
    return path


def test_cells_show_mean_and_range_over_seeds_and_the_flag(folder):
    rows = tables.rows()
    table = error_table(rows, fit.fit_family(rows, "ocr", draws=200))
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
    assert "quecc 0.123" in markdown and "| all | 15 |" in markdown


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
    a, b = (fit.fit_family(r, "ocr", draws=200).law for r in (rows, clean))
    np.testing.assert_allclose((a.A, a.alpha, a.beta, a.D), (b.A, b.alpha, b.beta, b.D))
