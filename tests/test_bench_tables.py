"""Runs side by side: Table 1's columns, their units, and the three formats."""

import csv
import json

import pytest

from vlm_jax import benchmarks
from vlm_jax.benchmarks import tables

ERRORS = "# a comment\nlm_params,visual_tokens,error,benchmark,compressor\n1e9,36,0.4,gqa,quecc\n1e9,36,0.3,mme,quecc\n"  # fmt: skip


def result(name, score, **details):
    return {
        "benchmark": name, "score": score, "error": 1 - score, "n": 10, "details": details,
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """A whole evaluation, and one benchmark scored alone."""
    first = tmp_path / "quecc_36"
    first.mkdir()
    scores = [
        result("textvqa", 0.4), result("vqav2", 0.7849), result("mme", 0.6, perception=1510.72, cognition=300.0),
        result("gqa", 0.62), result("mine", 1.0),
    ]  # fmt: skip
    (first / "scores.json").write_text(json.dumps(scores))
    (first / "errors.csv").write_text(ERRORS)
    second = tmp_path / "alone" / "out.json"
    second.parent.mkdir()
    second.write_text(json.dumps(result("pope", 0.859)))
    return [str(first), f"A|B_1={second}"]


def test_markdown_has_the_papers_columns_first_and_mme_in_points(runs, capsys):
    assert tables.main(runs) == 0
    assert capsys.readouterr().out == (
        "| Method   | Compressor | # Tokens |  GQA |    MME | POPE | VQAv2 | TextVQA (no OCR tokens) |  mine |\n"
        "| -------- | ---------: | -------: | ---: | -----: | ---: | ----: | ----------------------: | ----: |\n"
        "| quecc_36 |      quecc |       36 | 62.0 | 1510.7 |    - |  78.5 |                    40.0 | 100.0 |\n"
        "| A\\|B_1   |          - |        - |    - |      - | 85.9 |     - |                       - |     - |\n"
    )


def test_csv_leaves_absent_cells_empty(runs, capsys):
    assert tables.main([*runs, "--format=csv"]) == 0
    lines = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert lines[0][:4] == ["Method", "Compressor", "# Tokens", "GQA"]
    assert lines[2] == ["A|B_1", "", "", "", "", "85.9", "", "", ""]


def test_latex_escapes_what_latex_reads(runs, capsys):
    assert tables.main([runs[1], "--format", "latex"]) == 0
    assert capsys.readouterr().out == (
        "\\begin{tabular}{lr}\n\\toprule\nMethod & POPE \\\\\n\\midrule\nA|B\\_1 & 85.9 \\\\\n\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_every_heading_stands_for_a_benchmark():
    assert set(tables.TABLE_1) | set(tables.OTHERS) <= set(benchmarks.BENCHMARKS)
    assert len(tables.TABLE_1) == 8


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[", "is not valid JSON"),
        ('["x"]', "holds 'x', which is no score"),
        (json.dumps([result("gqa", 1.0)] * 2), "holds two scores of gqa"),
        ('[{"benchmark": "gqa", "score": null, "details": {}}]', "which is no score"),
        ('[{"benchmark": "mme", "score": 0.5, "details": {}}]', "which is no score"),
        ('[{"benchmark": ["gqa"], "score": 0.5, "details": {}}]', "which is no score"),
        ("[" * 100_000, "is nested too deeply to be read as JSON"),
    ],
)
def test_a_bad_score_file_is_named_with_exit_code_2(tmp_path, capsys, content, match):
    (tmp_path / "scores.json").write_text(content)
    assert tables.main([str(tmp_path)]) == 2
    assert match in capsys.readouterr().err
    (tmp_path / "scores.json").write_text(json.dumps([result("gqa", 1.0)]))
    (tmp_path / "errors.csv").write_bytes(b"lm\n\xff\n")
    assert tables.main([str(tmp_path)]) == 2
    assert "errors.csv:2: byte 0xff is no character in UTF-8" in capsys.readouterr().err
    assert tables.main([str(tmp_path / "nowhere")]) == 2
    assert "no file" in capsys.readouterr().err
