"""Flags, overrides, and one line per mistake."""

import pytest

from vlm_jax import cli
from vlm_jax.config import ConfigError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"a": {"size": 1, "names": ("p", "q"), "rate": 0.5}, "on": True})
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG)
    return str(tmp_path / "mine.py")


def parse(*argv, required=("config", "workdir")):
    return cli.parse(argv, {"workdir": "where"}, {"score": "whether"}, required)


def test_overrides_keep_their_field_s_type(config):
    flags = parse(
        f"--config={config}",
        "--workdir=d",
        "--config.a.size=3",
        "--config.a.names=('z',)",
        "--config.a.rate",
        "2",
        "--score",
    )
    assert flags.config.a.to_dict() == {"size": 3, "names": ("z",), "rate": 2.0}
    assert flags.workdir == "d" and flags.score and flags.config.is_locked
    assert not parse("--config", config, "--workdir=d", "--noconfig.on").config.on


@pytest.mark.parametrize(
    "words",
    [["a.jpg", "--text", "why ?"], ["--text=why ?", "a.jpg"], ["--image=a.jpg", "--text=why ?"]],
)
def test_one_word_may_stand_without_its_flag_wherever_it_stands(config, words):
    def parse_picture(*argv):
        texts = {"image": "what", "text": "ask"}
        return cli.parse(argv, texts, required=("config", "image"), positional="image")

    for argv in (
        [f"--config={config}", *words],
        [*words, f"--config={config}", "--config.a.size=3"],
    ):
        values = parse_picture(*argv)
        assert (values.image, values.text) == ("a.jpg", "why ?")
        assert values.config.a.size in (1, 3)
    with pytest.raises(ConfigError, match=r"'b.jpg' is not a flag"):
        parse_picture(f"--config={config}", *words, "b.jpg")
    with pytest.raises(ConfigError, match="--image is missing"):
        parse_picture(f"--config={config}", "--text=why ?")


def test_two_commands_in_one_process_do_not_share_flags(config):
    assert parse(f"--config={config}", "--workdir=d", "--config.a.size=3").config.a.size == 3
    assert parse(f"--config={config}", "--workdir=e").config.a.size == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir=d"], "--config is missing"),
        (["--config=CONFIG"], "--workdir is missing"),
        (["--config=CONFIG", "--workdir=d", "more"], "'more' is not a flag"),
        (
            ["--config=CONFIG", "--workdir=d", "--scor"],
            "Unknown command line flag 'scor'. Did you mean: score",
        ),
        (
            ["--config=CONFIG", "--workdir=d", "--config.a.sise=2"],
            "config.a has no field 'sise'; it has: names, rate, size.",
        ),
        (
            ["--config=CONFIG", "--workdir=d", "--config.a.size.x=2"],
            "config.a.size has no field 'x'; it has: no fields.",
        ),
        (["--config=CONFIG", "--workdir=d", "--config.a.size=big"], "invalid literal for int"),
        (["--config=CONFIG.nope", "--workdir=d"], "no file"),
        (["--config.a.size=2", "--workdir=d"], "needs --config=FILE before it"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(config, capsys, argv, message):
    code = cli.run(parse_all, [word.replace("CONFIG", config) for word in argv])
    out, err = capsys.readouterr()
    assert (
        code == 2
        and out == ""
        and message in err
        and err.count("\n") == 1
        and err.startswith("error: ")
    )


def parse_all(argv):
    parse(*argv)


def test_a_config_file_that_does_not_load_is_named(tmp_path):
    (tmp_path / "broken.py").write_text(
        "def get_config():\n    raise ValueError('half a config')\n"
    )
    with pytest.raises(ConfigError, match=r"broken.py does not load: ValueError: half a config"):
        parse(f"--config={tmp_path}/broken.py", "--workdir=d")


def test_other_errors_are_not_swallowed():
    def command(argv):
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError):
        cli.run(command, [])
    assert cli.run(lambda argv: None, []) == 0


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0 and "--score: whether" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["stage1", "stage1.py", "configs/stage1.py"])
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([f"--config={name}"], ["--config", name]):
        values = cli.parse([*words, "--config.data.batch_size=8"], {}, required=())
        assert values.config.optim.trainable == "^(compressor|projector)/"
        assert values.config.data.batch_size == 8
    assert cli.load_config(name).data.batch_size == 256


def test_a_file_of_the_user_s_goes_before_a_config_of_the_package(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.py").write_text(CONFIG)
    assert cli.load_config("configs/stage1.py").a.size == 1
    with pytest.raises(ConfigError, match=r"no file 'elsewhere/stage1.py'"):
        cli.load_config("elsewhere/stage1.py")
