"""Addresses that are no bucket's are refused wherever a path is taken; text and JSON are read, or refused in one line."""

import codecs
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

from vlm_jax import evaluate, files, show, train
from vlm_jax.settings import addresses, cli
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import run as experiment


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("ftp://bucket/run", "ftp://bucket/run"),
        ("az://bucket", "az://bucket"),
        ("('a.json', 'hdfs://b.json')", "hdfs://b.json"),
        ("name=https://x.org/errors.csv", "https://x.org/errors.csv"),
    ],
)
def test_an_address_is_refused_with_what_to_do_instead(value, address):
    with pytest.raises(ConfigError) as caught:
        addresses.check_usable("--workdir", value)
    assert str(caught.value) == (
        f"--workdir: {address!r} cannot be used; paths are those of this machine, gs://bucket/.. and s3://bucket/..: mount it "
        "or copy it to a local disk or a bucket, and give the path there."
    )


def test_of_a_file_address_the_scheme_is_to_be_left_out():
    with pytest.raises(ConfigError, match=r"leave out file:// and give '/tmp/run'\.$"):
        addresses.check_usable("--out", "file:///tmp/run")


def test_of_a_bucket_the_case_and_the_missing_name_are_told():
    with pytest.raises(ConfigError, match=r"write gs://b/run\.$"):
        addresses.check_usable("--out", "GS://b/run")
    with pytest.raises(ConfigError, match=r"name the bucket: gs://BUCKET/\.\.\.$"):
        addresses.check_usable("--out", "gs:///run")


@pytest.mark.parametrize(
    "path",
    [
        "gs:",
        "gs://b/run",
        "('a', 'gs://b/run')",
        "a/b:c",
        "v5e:16x16",
        "C:/runs",
        "a//b",
        "x=1",
        "",
    ],
)
def test_paths_that_look_a_little_like_addresses_are_paths(path):
    addresses.check_usable("--workdir", path)


@pytest.mark.parametrize(
    ("argv", "owner"),
    [
        (["--workdir=hdfs://b"], "--workdir"),
        (["--workdir", "hdfs://b"], "--workdir"),
        (["--config=c.py", "--config.data.image_roots=('hdfs://b',)"], "--config.data.image_roots"),
        (["hdfs://b/errors.csv", "--out", "law.json"], "command line"),
    ],
)
def test_every_command_refuses_an_address_before_it_does_anything(argv, owner, capsys):
    def command(argv):
        raise AssertionError("the command was called")

    assert cli.run(command, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {owner}: 'hdfs://b") and len(said.splitlines()) == 1


def test_words_to_a_model_may_name_addresses():
    words = [
        "--question",
        "What is gs://b ?",
        "--question=gs://b",
        "--config.data.system=see x://y",
    ]
    assert cli.run(lambda argv: 0, words) == 0


@pytest.mark.parametrize("field", ["data.annotations", "init.lm", "data.tokenizer"])
def test_a_config_with_an_address_is_refused_by_its_field(tmp_path, field):
    cfg = tiny.config(tmp_path)
    node, name = cfg[field.split(".")[0]], field.split(".")[1]
    node[name] = ("hdfs://b",) if name == "annotations" else "hdfs://b"
    for command in (train.train, evaluate.evaluate):
        with pytest.raises(ConfigError, match=rf"^config\.{field}: 'hdfs://b' cannot be used"):
            command(cfg, str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=rf"^config\.{field}: "):
        show.show(cfg, "a.png", "What ?", "")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_with_an_address_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (experiment.open_workdir, experiment.read):
        with pytest.raises(ConfigError, match="'hdfs://b/run' cannot be used"):
            use("hdfs://b/run")
    assert list(tmp_path.iterdir()) == []


TEXT = "é,1\nzwei\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    ],
)
def test_text_is_read_in_the_encoding_that_its_mark_names(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert files.read_text(tmp_path / "a") == TEXT


def test_a_byte_that_is_no_text_is_named_by_its_line(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(ConfigError) as caught:
        files.read_text(path)
    assert str(caught.value) == (
        f"{path}:2: byte 0xe9 is no character in UTF-8; save the file as UTF-8."
    )


def test_utf_16_without_its_mark_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("one\n".encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"a:1: byte 0x00 is in no text; save the file as UTF-8"):
        files.read_text(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b'{"a": ', "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not a list."),
        (b"[" * 100_000, "is nested too deeply to be read as JSON."),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"\x80\x02}q\x00.", ":1: byte 0x80 is no character in UTF-8"),
    ],
)
def test_a_damaged_json_file_is_one_line_with_its_name(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        files.read_json(path)
    assert words in str(caught.value) and str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[" * 100_000, b'{"model": 3}', b'{"model": {"lm": {"rope_scaling": {}}}}', b"\xff"],
)
def test_a_damaged_config_or_final_file_of_a_run_is_one_line(tmp_path, content):
    for name, read in (("config.json", experiment.read), ("final.json", experiment.finished)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_whose_config_has_one_wrong_value_says_which(tmp_path):
    exp = experiment.resolve(tiny.config(tmp_path))
    experiment.write(exp, tmp_path)
    path = tmp_path / "config.json"
    for old, new, words in (
        ('"width": 16', '"width": "wide"', "is no config of a run (Type"),
        ('"norm_eps": 1e-06', '"norm_epsilon": 1e-06', "unknown field 'norm_epsilon'"),
    ):
        experiment.write(exp, tmp_path)
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(ConfigError) as caught:
            experiment.read(tmp_path)
        assert words in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_reader_finds_the_old_content_or_the_new_one_never_a_part(tmp_path):
    path, sizes = tmp_path / "run.json", set()
    files.write_whole(path, "a" * 4_000_000)
    done = threading.Event()

    def read():
        while not done.is_set():
            sizes.add((len(text := path.read_text()), text[:1]))

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        for letter in "bcabca":
            files.write_whole(path, letter * (3_000_000 if letter == "b" else 4_000_000))
        done.set()
        reader.result()
    assert sizes <= {(4_000_000, "a"), (3_000_000, "b"), (4_000_000, "c")}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_the_old_content_and_no_other_file(tmp_path):
    path = tmp_path / "run.json"
    files.write_whole(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError) as caught:
            files.write_whole(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value) == (
        f"{path} cannot be written: File too large; give another path, or free or mend the disk."
    )
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    files.write_whole(tmp_path / "link", "é")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == "é".encode()
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(tmp_path / "pipe", "told")
    assert os.read(end, 9) == b"told" and (tmp_path / "pipe").is_fifo()
    os.close(end)


def test_a_folder_is_filled_or_absent_and_never_written_over(tmp_path):
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("all")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "all"
    with (
        pytest.raises(ConfigError, match="out' exists and is not empty; choose another"),
        files.whole_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "a").read_text() == "all"
