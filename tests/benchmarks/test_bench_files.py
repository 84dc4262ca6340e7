"""Native files as records: what is found, the wording of a fault, and pictures that stay in their parquet file."""

import pickle

import pyarrow
import pyarrow.parquet
import pytest
from native_files import embedded, png, write_json, write_parquet, write_text

from vlm_jax.benchmarks import files, records
from vlm_jax.data import images, sources
from vlm_jax.data import rows as rows_of
from vlm_jax.settings.checks import ConfigError

NAN = float("nan")


def test_the_first_pattern_with_a_match_decides_and_a_file_stands_for_itself(tmp_path):
    for name in ("b.json", "a.json", "c.tsv"):
        write_text(tmp_path / name, "")
    found = files.find("x", tmp_path, "*.jsonl", "*.json", "*.tsv")
    assert [file.name for file in found] == ["a.json", "b.json"]
    assert files.find("x", tmp_path / "c.tsv", "*.json", "?.tsv") == [tmp_path / "c.tsv"]
    with pytest.raises(ConfigError, match=r"x: .*c\.tsv is not read here; give \*\.json or b\.p\*"):
        files.find("x", tmp_path / "c.tsv", "*.json", "b.p*")
    assert files.find_one("x", tmp_path, "c.*") == tmp_path / "c.tsv"
    with pytest.raises(ConfigError, match=r"holds a\.json, c\.tsv; name the file that is meant"):
        files.find_one("x", tmp_path, "a.*", "c.*")
    with pytest.raises(ConfigError, match=r"x: .* holds none of \*\.jsonl, d; give the directory"):
        files.find("x", tmp_path, "*.jsonl", "d")


@pytest.mark.parametrize(
    ("name", "content", "inside", "expected"),
    [
        ("a.json", '[{"k": 1}, {"k": 2}]', "", [("row 0", "", 1), ("row 1", "", 2)]),
        ("a.json", '{"x": {"k": 1}, "y": {"k": 2}}', "", [("row x", "x", 1), ("row y", "y", 2)]),
        ("a.json", '{"data": [{"k": 1}], "n": 0}', "data", [("row 0", "", 1)]),
        ("a.jsonl", '\n{"k": "\u2028"}\n\n{"k": 2}', "", [("row 0", "", "\u2028"), ("row 1", "", 2)]),
        ("a.tsv", 'j\tk\n\t"a\nb"\n1\t""\n', "", [("row 0", "", "a\nb"), ("row 1", "", "")]),
        ("a.tsv", "k\n" + "x" * 200_000, "", [("row 0", "", "x" * 200_000)]),
    ],
)  # fmt: skip
def test_each_kind_of_file_gives_records_that_know_where_they_stand(
    tmp_path, name, content, inside, expected
):
    write_text(tmp_path / name, content)
    found = files.read("x", [tmp_path / name], inside)
    where = f"x: {tmp_path / name} "
    assert [(r.where, r.key, r.values["k"]) for r in found] == [
        (where + at, key, value) for at, key, value in expected
    ]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", "[3]", r"a.json row 0: must be an object, got 3; correct"),
        ("a.json", "3", r"a.json: must hold a list, not a int; correct"),
        ("a.json", "[" * 100_000, r"a.json: is not valid JSON: maximum recursion"),
        ("a.jsonl", '{"k": 1}\n\n{', r"a.jsonl line 3: is not valid JSON: .*; correct"),
        ("a.tsv", "a\tb\n1", r"a.tsv row 0: does not have 2 columns; correct"),
        ("a.tsv", "a\tb\n1\t2\t3", r"a.tsv row 0: does not have 2 columns; correct"),
        ("a.parquet", "PAR1", r"a.parquet: is not valid parquet: .*; correct"),
        ("a.txt", "", r"a.txt is none of .json, .jsonl, .tsv, .parquet; name"),
    ],
)
def test_a_fault_of_a_file_is_one_line_with_benchmark_file_and_place(
    tmp_path, name, content, match
):
    write_text(tmp_path / name, content)
    with pytest.raises(ConfigError, match=match) as error:
        list(files.read("x", [tmp_path / name]))
    assert str(error.value).startswith(f"x: {tmp_path}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.tsv"])
def test_a_file_that_is_absent_or_no_text_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} does not exist; give the directory"):
        list(files.read("x", [tmp_path / name]))
    (tmp_path / name).write_bytes(b"a\tb\n\xff\t1")
    with pytest.raises(ConfigError, match=f"x: .*{name}: is not UTF-8: .*; correct"):
        list(files.read("x", [tmp_path / name]))


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda r: r.text("no", "none"), "has no 'no' or 'none'; correct"),
        (lambda r: r.text("null"), "has no 'null'"),
        (lambda r: r.text("yes"), "'yes' must be a string, got True"),
        (lambda r: r.text("list"), "'list' must be a string"),
        (lambda r: r.whole("half"), "'half' must be a whole number, got 0.5"),
        (lambda r: r.whole("yes"), "'yes' must be a whole number, got True"),
        (lambda r: r.texts("half"), "'half' must be a list of strings, got 0.5"),
        (lambda r: r.texts("deep"), "'deep' must be a list of strings"),
        (lambda r: r.image("half"), "'half' must be an image or its path, got 0.5"),
        (lambda r: r.image("empty"), "'empty' must be an image or its path, got ''"),
        (lambda r: r.part("list"), "'list' must be an object, got "),
        (lambda r: r.name(), "has no name: the file must be an object of records"),
    ],
)
def test_a_fault_of_a_field_is_one_line_with_its_row(ask, match):
    values = {"null": None, "yes": True, "half": 0.5, "list": ["a", 1], "deep": [[]], "empty": ""}
    record = records.RawRecord("x: f row 3", "", values)
    with pytest.raises(ConfigError, match=f"^x: f row 3: {match}"):
        ask(record)


def test_fields_are_read_as_what_is_asked_for():
    values = {
        "a": None,
        "b": 1.5,
        "c": "x",
        "d": [1, "y"],
        "e": NAN,
        "f": " None ",
        "g": 7,
        "h": {"k": 1},
    }
    record = records.RawRecord("x", "name", values)
    assert (record.text("a", "b"), record.texts("c"), record.texts("d")) == ("1.5", ["x"], ["1", "y"])  # fmt: skip
    assert (record.optional("a"), record.optional("z"), record.optional("e")) == ("", "", "")
    assert (record.optional("f"), record.optional("g"), record.whole("g")) == ("", "7", 7)
    assert (record.part("z"), record.part("h")) == ({}, {"k": 1})
    assert (record.image("c"), record.image("c", folder="in"), record.name()) == ("x", "in/x", "name")  # fmt: skip


def test_pictures_of_a_parquet_file_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"n": i, "image": embedded(i), "many": [embedded(i + 100)]} for i in range(150)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    found = list(files.read("x", [path]))
    assert [record.values["n"] for record in found] == list(range(150))
    for i in (149, 0, 69, 70, 139, 140):
        image = pickle.loads(pickle.dumps(found[i].image("image")))
        assert image() == png(i) and found[i].image("many")() == png(i + 100)
    assert len(pickle.dumps(found[5].image("image"))) < 400
    raw = records.row("r", found[5].image("image"), "Q", "A")
    record = sources.parse(raw, "f", "", "r", generate=True)
    (image,) = record.images
    assert images.load(image, 2, "stretch", (0.0,) * 3, 100).tolist() == [[[5] * 3] * 2] * 2
    pixels = rows_of.Pixels(2, "stretch", (0.0,) * 3, 100, "bicubic")
    assert pixels.load(record, image).tolist() == [[[5] * 3] * 2] * 2
    with pytest.raises(ConfigError, match="image '<bytes>' is not in the index of features_dir"):
        rows_of._feature_row({}, record, image)
    path.unlink()
    files._column.cache_clear()
    with pytest.raises(images.ImageError, match="the image file does not exist"):
        images.load(image, 2, "stretch", (0.0,) * 3, 100)


def test_a_picture_that_is_absent_or_a_path_in_a_parquet_file_is_told_apart(tmp_path):
    rows = [
        {"a": embedded(), "b": None},
        {"a": None, "b": {"bytes": None, "path": "1.png"}},
        {"a": {"bytes": b"", "path": None}, "b": None},
    ]
    write_parquet(tmp_path / "a.parquet", rows)
    first, second, third = files.read("x", [tmp_path / "a.parquet"])
    assert first.image("a")() == png() and not first.has("b")
    assert second.image("a", "b", folder="in") == "in/1.png" and not second.has("a")
    with pytest.raises(ConfigError, match="row 2: has no 'a'"):
        third.image("a")


def test_a_missing_shard_is_an_error(tmp_path):
    for i in (0, 2):
        write_json(tmp_path / "data" / f"test-{i:05d}-of-00003-ab12.parquet", [])
    with pytest.raises(
        ConfigError, match=r"data holds 2 of the 3 files test-\*.parquet; add the others"
    ):
        files.find("x", tmp_path, *files.shards("test"))
