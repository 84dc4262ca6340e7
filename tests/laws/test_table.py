"""errors.csv: what is read back, what is refused and with which words."""

from pathlib import Path

import numpy as np
import pytest

from vlm_jax.costs import price
from vlm_jax.laws import table
from vlm_jax.laws.table import Row
from vlm_jax.settings.checks import ConfigError

PAPER = Path(table.__file__).parent / "data"


def row(**changes) -> Row:
    fields = {
        "lm_params": 5e8, "visual_tokens": 4, "error": 0.25, "benchmark": "gqa", "family": "reasoning",
        "lm": "small", "compressor": "tokenpacker", "n": 400, "seed": 1, "flops": 1.5e9, "seconds": 0.125,
    }  # fmt: skip
    return Row(**{**fields, **changes})


def write_text(tmp_path, text: str):
    path = tmp_path / "errors.csv"
    path.write_text(text)
    return path


def test_rows_survive_writing_and_reading(tmp_path):
    rows = [
        row(),
        row(seed=2, n=None, flops=None, seconds=None, flag="chance level, seed 2"),
        row(visual_tokens=16),
        row(elastic=True, train_samples=1000),
        row(train_samples=1000, validation_loss=1.75),
    ]
    table.write(tmp_path / "e.csv", rows)
    assert table.read(tmp_path / "e.csv") == rows
    assert len({r.key for r in rows}) == 5  # an elastic training's cell is another one


def test_a_table_from_before_rows_said_how_they_were_trained_is_read(tmp_path):
    names = [name for name in table.COLUMNS if name not in ("elastic", "validation_loss")]
    table.write(tmp_path / "e.csv", [row(train_samples=1000)])
    lines = [line.split(",")[: len(names)] for line in (tmp_path / "e.csv").read_text().splitlines()]  # fmt: skip
    assert lines[0] == names
    path = write_text(tmp_path, "\n".join(",".join(line) for line in lines))
    assert table.read(path) == [row(train_samples=1000)]
    path = write_text(tmp_path, "lm_params,visual_tokens,error,elastic\n1e9,4,0.5,maybe")
    with pytest.raises(ConfigError, match="elastic 'maybe' must be yes, no or empty"):
        table.read(path)


def test_held_out_losses_stand_in_for_errors_once_per_training():
    rows = [row(validation_loss=1.5), row(validation_loss=1.5, benchmark="pope"), row(seed=2)]
    (one,) = table.held_out(rows)
    assert (one.error, one.benchmark, one.family, one.n) == (1.5, "validation_loss", "validation_loss", None)  # fmt: skip
    with pytest.raises(ConfigError, match="no row has a validation_loss"):
        table.held_out([row()])


def test_several_tables_are_one_unless_they_share_a_cell(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, tokens in zip(paths, (1, 4), strict=True):
        path.write_text(f"lm_params,visual_tokens,error\n7e9,{tokens},.5\n")
    assert [row.visual_tokens for row in table.read_all(paths)] == [1, 4]
    with pytest.raises(ConfigError, match=r"a.csv and .*a.csv: duplicate cell"):
        table.read_all([paths[0], paths[0]])
    with pytest.raises(
        ConfigError, match=r"is a directory; give the table in it, such as .*errors.csv"
    ):
        table.read(tmp_path)


def test_three_columns_are_enough_and_comments_are_skipped(tmp_path):
    path = write_text(
        tmp_path, "# mine\nlm_params,visual_tokens,error\n7e9,16,.4\n# more\n500000000,1,.6\n"
    )
    first, second = table.read(path)
    assert (first.lm, first.lm_params, first.visual_tokens, first.error) == ("7B", 7e9, 16, 0.4)
    assert (second.lm, second.family, second.seed, second.n) == ("500M", "all", 0, None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("visual_tokens,error\n1,.5", "column 'lm_params' is missing"),
        ("lm_params,visual_tokens,error,eror\n7e9,1,.5,1", "unknown column 'eror'"),
        (",lm_params,visual_tokens,error\n0,7e9,1,.5", "to_csv(.., index=False)"),
        ("LM_Params,visual_tokens,error\n7e9,1,.5", "write 'LM_Params' in small letters"),
        ("lm_params;visual_tokens;error\n1,1e9;1;.5", "write a decimal point"),
        ("lm_params,visual_tokens,error\n7e9,1,53.5", "divide percentages by 100"),
        ("lm_params,visual_tokens,error\n7e9,1,nan", "error nan is outside [0, 1]"),
        ("lm_params,visual_tokens,error\n7e9,1,-.1", "error -0.1 is outside [0, 1]"),
        ("lm_params,visual_tokens,error\n7,1,.5", "give parameters, not billions (7e+09?)"),
        ("lm_params,visual_tokens,error\n7e9,0,.5", "visual_tokens 0 must be at least 1"),
        ("lm_params,visual_tokens,error\n7e9,1.5,.5", "visual_tokens '1.5' is not a whole number"),
        ("lm_params,visual_tokens,error\n7e9,1,x", "error 'x' is not a number"),
        ("lm_params,visual_tokens,error\n7B,1,.5", "lm_params '7B' is not a number"),
        ("lm_params,visual_tokens,error\n7e9,1,50%", "error '50%' is not a number"),
        ("lm_params,visual_tokens,error\n7e9,1,inf", "error inf is outside [0, 1]"),
        ("lm_params,visual_tokens,error\ninf,1,.5", "lm_params 'inf' is not a finite number"),
        ("lm_params,visual_tokens,error\nnan,1,.5", "lm_params 'nan' is not a finite number"),
        (
            "lm_params,visual_tokens,error\n7e9,1e999,.5",
            "visual_tokens '1e999' is not a finite number",
        ),
        (
            "lm_params,visual_tokens,error,seconds\n7e9,1,.5,nan",
            "seconds 'nan' is not a finite number",
        ),
        ("lm_params,visual_tokens,error\n7e9,1", "2 values for 3 columns"),
        (
            "lm_params,visual_tokens,error\n7e9,1,.5\n7e9,1,.6",
            "duplicate cell (all/all, lm 7B, 1 visual tokens, seed 0)",
        ),
        (
            "lm,lm_params,visual_tokens,error\na,7e9,1,.5\na,8e9,4,.6",
            "lm 'a' has two sizes, 7000000000 and 8000000000; give one language model one size",
        ),
        (
            "lm_params,visual_tokens,error\n6738415616,1,.5\n6738423808,4,.4",
            ":3: lm '6.74B' has two sizes, 6738415616 and 6738423808; give one language model one size, and two different "
            "names in the column lm.",
        ),
        ("lm_params,visual_tokens,error,error\n7e9,1,.5,.6", ":1: column 'error' is there twice"),
        (
            "lm_params,visual_tokens,error\n7_000_000_000,1,.5",
            ":2: lm_params '7_000_000_000' is not",
        ),
        (
            "lm_params;visual_tokens;error\n7e9;1;0,5",
            ":2: error '0,5' is not a number; write a decimal point, and no commas.",
        ),
        (
            'lm_params,visual_tokens,error\n"7,000,000,000",1,.5',
            ":2: lm_params '7,000,000,000' is not a number; write a decimal point, and no commas.",
        ),
        ("lm_params,visual_tokens,error,n\n7e9,1,.5,-3", ":2: n -3 is negative; leave it empty."),
        ('lm_params,visual_tokens,error,lm\n7e9,1,.5,"a\n7e9,2,.4,b', ":2: is not valid CSV"),
        (
            "lm_params,visual_tokens,error\n7e9,1,.5\n\n7e9,1,.6",
            ":4: duplicate cell (all/all, lm 7B",
        ),
        ("lm_params,visual_tokens,error\n7e9,1,.5\n\n7e9,1,.6", "also in line 2; keep one row"),
        ("lm_params,visual_tokens,error,\n7e9,1,.5,", ":1: unknown column ''"),
        ("", "the table is empty"),
        ("lm_params,visual_tokens,error\n1e300,1,.5", ":2: lm_params 1e+300 is above 1e+15."),
        ("lm_params,visual_tokens,error\n7e9,1e300,.5", ":2: visual_tokens 1e+300 must be at most"),
        ("lm_params,visual_tokens,error\n7e9,\0,.5", ":2: byte 0x00 is in no text; save the file"),
        ("# nothing\n", "the table is empty"),
        ("lm_params,visual_tokens,error\n", "the table has no rows"),
    ],
)
def test_a_bad_table_is_refused_with_one_line_that_names_the_fault(tmp_path, body, words):
    path = write_text(tmp_path, body)
    with pytest.raises(ConfigError) as caught:
        table.read(path)
    text = str(caught.value)
    assert words in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize(
    ("divider", "encoding"),
    [
        ("\t", "utf-16"),  # "Unicode text" of spreadsheets
        (",", "utf-16-le"),
        (";", "utf-8-sig"),
        (",", "utf-8"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_of_spreadsheets_are_read_whatever_divides_cells_and_lines(
    tmp_path, divider, encoding, end
):
    lines = [
        "# mine, all",
        "lm_params,visual_tokens,error,lm,benchmark",
        "7e9,1,.5,Größe,a",
        ",,,,",
        "7e9,16,.4,Größe,a",
    ]
    text = end.join(lines).replace(",", divider) + end
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    path = tmp_path / "errors.csv"
    path.write_bytes(mark + text.encode(encoding))
    read = table.read(path)
    assert [(r.lm_params, r.visual_tokens, r.error, r.lm) for r in read] == [
        (7e9, 1, 0.5, "Größe"),
        (7e9, 16, 0.4, "Größe"),
    ]


def test_a_quoted_cell_may_hold_dividers_comment_signs_and_line_breaks(tmp_path):
    path = write_text(
        tmp_path,
        'lm_params,"visual\n_tokens",error,lm\n'.replace("visual\n_", "visual_")
        + '7e9,1,.5,"a, ""b""\n# c"\n7e9,4,x,d\n',
    )
    with pytest.raises(ConfigError, match=r"errors\.csv:4: error 'x' is not a number"):
        table.read(path)
    path.write_text(path.read_text().replace(",x,d", ",.4,d"))
    assert [r.lm for r in table.read(path)] == ['a, "b" # c', "d"]


def test_a_table_in_another_encoding_is_refused_by_the_line_of_the_first_such_byte(tmp_path):
    path = tmp_path / "errors.csv"
    path.write_bytes("lm_params,visual_tokens,error,lm\n7e9,1,.5,Größe\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        table.read(path)
    assert str(caught.value) == (
        f"{path}:2: byte 0xf6 is no character in UTF-8; save the file as UTF-8."
    )


def test_a_faulty_value_is_named_by_its_line(tmp_path):
    path = write_text(tmp_path, "# c\nlm_params,visual_tokens,error\n\n7e9,1,.5\n7e9,4,2\n")
    with pytest.raises(ConfigError, match=r"errors\.csv:5: error 2"):
        table.read(path)


def test_appending_twice_leaves_the_same_file_and_a_new_value_replaces_the_old(tmp_path):
    path = tmp_path / "e.csv"
    table.append(path, [row(), row(seed=2)])
    before = path.read_bytes()
    table.append(path, [row(seed=2)])
    assert path.read_bytes() == before
    after = table.append(path, [row(error=0.5), row(seed=3)])
    assert [(r.seed, r.error) for r in after] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    assert table.read(path) == after


def test_a_refused_append_leaves_the_old_table_whole(tmp_path):
    path = tmp_path / "e.csv"
    table.append(path, [row()])
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        table.append(path, [row(seed=2, error=float("nan"))])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.csv"]


def test_a_familys_error_is_the_unweighted_mean_over_its_benchmarks():
    rows = [
        row(benchmark="a", error=0.2, n=10),
        row(benchmark="b", error=0.4, n=1000),
        row(family="ocr", error=0.9),
    ]
    (mean,) = table.family_mean(rows, "reasoning")
    assert mean.error == pytest.approx(0.3) and mean.n == 1010 and mean.benchmark == "mean"


def test_a_cell_without_one_of_the_benchmarks_is_refused():
    rows = [row(benchmark="a"), row(benchmark="b"), row(benchmark="a", visual_tokens=16)]
    with pytest.raises(ConfigError, match="16 visual tokens, seed 1 has no row for benchmark 'b'"):
        table.family_mean(rows, "reasoning")


def test_a_flag_on_one_benchmark_flags_the_family_cell():
    rows = [row(benchmark="a", flag="chance level"), row(benchmark="b")]
    assert table.family_mean(rows, "reasoning")[0].flag == "chance level"


@pytest.mark.parametrize("family", ["reasoning", "ocr"])
def test_the_published_tables_ship_with_the_package(family):
    rows = table.read(PAPER / f"paper_{family}.csv")
    assert len(rows) == 28 and {r.family for r in rows} == {family}
    errors = np.array([r.error for r in rows]).reshape(4, 7)
    assert (
        np.diff(errors, axis=1) < 0
    ).all()  # more tokens, fewer errors, in each row of both tables
    corner = {"reasoning": (0.6145, 0.4646), "ocr": (0.9021, 0.6539)}[family]
    assert (errors[0, 0], errors[-1, -1]) == corner


def test_two_n_q_plus_v():
    assert price.paper_flops(7e9, 50, 16) == 2 * 7e9 * 66
