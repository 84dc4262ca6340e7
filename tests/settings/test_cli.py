"""Flags, overrides, and one line per mistake."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax import aot
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

ROOT = Path(__file__).resolve().parents[2]

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
            "config.a has no field 'sise'; it has: names, rate, size. Did you mean --config.a.size ?",
        ),
        (
            ["--config=CONFIG", "--workdir=d", "--config.a.size.x=2"],
            "config.a.size has no field 'x'; it has: no fields.",
        ),
        (["--config=CONFIG", "--workdir=d", "--config.rate=2"], "Did you mean --config.a.rate ?"),
        (["--config=CONFIG", "--workdir=d", "--rate=2"], "Did you mean: --config.a.rate ?"),
        (["--config=CONFIG", "--workdir=d", "--a.size=2"], "Did you mean: --config.a.size ?"),
        (["--config=CONFIG", "--workdir=d", "--config.a=2"], "config.a is a block, not a field"),
        (["--config=CONFIG", "--workdir=d", "--config.a.size=big"], "invalid literal for int"),
        (["--config=CONFIG.nope", "--workdir=d"], "no file"),
        (["--config=stage3", "--workdir=d"], "stage2.py"),
        (
            ["--config=stage1", "--workdir=d", "--config.train.random_frozen=yes"],
            "boolean flag: yes; --help",
        ),
        (["--config.a.size=2", "--workdir=d"], "needs --config=FILE before it"),
        (
            [],
            "command line: --config and --workdir are missing (a file of configs/, such as configs/stage1.py; where); usage: ",
        ),
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


def test_help_lists_the_flags_and_the_fields_of_the_config_file(config, capsys):
    for words in (["--help"], ["-h", "--nothing"], ["--workdir=d", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "--score:   whether" in out
        assert out.startswith("usage: ") and "--config.FIELD=VALUE" not in out.splitlines()[-1]
    with pytest.raises(SystemExit):
        parse(f"--config={config}", "--help")
    assert "  --config.a.names=('p', 'q')\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--config.a.names=('z',)", "--config.a.names ('z',)"])
def test_a_flag_that_is_given_twice_has_its_last_value(config, flag):
    first = ["--config.a.names=('w','y')", "--config.a.size=2", "--workdir=c"]
    flags = parse(f"--config={config}", *first, "--config.on=false", *flag.split(" "),
                  "--config.on", "--config.a.size", "3", "--workdir=d")  # fmt: skip
    assert flags.config.to_dict() == {"a": {"size": 3, "names": ("z",), "rate": 0.5}, "on": True}
    assert flags.workdir == "d"


def test_a_field_named_by_a_python_keyword_can_be_set():
    for words in (["--config.init.from=a"], ["--config.init.from", "a"]):
        values = cli.parse(["--config=stage2", *words, "--config.init.lm=b"], {}, required=())
        assert (values.config.init["from"], values.config.init.lm) == ("a", "b")
        assert values.config.is_locked and cli.given_fields(words) == ("init.from",)


def test_the_last_config_file_counts_wherever_it_stands(config, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(CONFIG.replace('"size": 1', '"size": 8'))
    flags = parse(f"--config={config}", "--config.a.rate=2", "--workdir=d", f"--config={other}")
    assert flags.config.a.to_dict() == {"size": 8, "names": ("p", "q"), "rate": 2.0}


@pytest.mark.parametrize(
    "module",
    ["train", "evaluate", "sweep", "aot", "show", "features", "laws.fit", "laws.plan", "laws.plot"],
)
def test_every_command_without_flags_says_in_one_line_what_it_needs(module, capsys, monkeypatch):
    main = importlib.import_module(f"vlm_jax.{module}").main
    path = "aot/__main__" if module == "aot" else module.replace(".", "/")
    for called, name in (
        (f"/x/vlm_jax/{path}.py", f"python -m vlm_jax.{module}"),
        (f"/usr/bin/vlm-jax-{module}", f"vlm-jax-{module}"),
    ):
        monkeypatch.setattr("sys.argv", [called])
        assert main([]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("error: command line: ")
        assert "missing" in err or "required" in err
        assert f"usage: {name} " in err and "--help" in err
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        told = capsys.readouterr().out
        assert stop.value.code == 0 and f"usage: {name} " in told
        assert re.findall(r"--(?!config\.)[a-z-]*_\w*", told) == []  # flags are written with dashes


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("*.s[hb]*")), ids=lambda p: p.name
)
def test_scripts_answer_help_and_unknown_options_before_they_do_anything(script, tmp_path):
    """Copied to an empty folder, a script cannot make an environment, and must not try."""
    if script.name == "environment.sh":
        pytest.skip("is sourced by the others")
    copied = tmp_path / "scripts" / script.name
    copied.parent.mkdir()
    shutil.copy(script, copied)
    for words, code in ((["--help"], 0), (["--helo"], 2), (["--helo=1"], 2)):
        done = subprocess.run(["bash", copied, *words], capture_output=True, text=True, timeout=20)
        assert done.returncode == code, done.stderr
        assert "usage: " in (done.stdout if code == 0 else done.stderr)
        if code and script.name != "tpu_run.sh":  # which hands its words to tpu_create.sh
            assert f"unknown argument '{words[0]}'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize("name", ["stage1", "stage1.py", "configs/stage1.py"])
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([f"--config={name}"], ["--config", name]):
        values = cli.parse([*words, "--config.data.batch_size=8"], {}, required=())
        assert values.config.optim.trainable == "^(compressor|projector)/"
        assert values.config.data.batch_size == 8
    assert cli.load_config(name).data.batch_size == 256


def test_a_folder_configs_of_the_user_s_does_not_hide_the_package_s(tmp_path):
    """In a process of its own: whichever `configs` is imported first stays."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    call = "from vlm_jax.settings import cli; print(cli.load_config('stage1').data.batch_size)"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.stdout == "256\n", done.stderr


def test_a_file_of_the_user_s_goes_before_a_config_of_the_package(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.py").write_text(CONFIG)
    assert cli.load_config("configs/stage1.py").a.size == 1
    with pytest.raises(ConfigError, match=r"no file 'elsewhere/stage1.py'"):
        cli.load_config("elsewhere/stage1.py")


@pytest.mark.parametrize(
    ("command", "field", "value", "quoted"),
    [
        ("train", "data.annotations", "2024", "('2024',)"),
        ("train", "data.image_roots", "('a', 7)", "('a', '7')"),
        ("features", "data.annotations", "None", "('None',)"),
        ("evaluate", "eval.annotations", "2024", "('2024',)"),
        ("evaluate", "eval.benchmarks", "True", "('True',)"),
    ],
)
def test_a_name_that_is_read_as_a_number_is_asked_for_in_quotes(
    command, field, value, quoted, tmp_path, capsys
):
    main = importlib.import_module(f"vlm_jax.{command}").main
    owner, _, name = field.partition(".")
    words = [
        "--config=configs/mini.py",
        "--config.eval.checkpoint=x",
        f"--workdir={tmp_path / 'w'}",
    ]
    assert main([*words, f"--config.{field}={value}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {owner}: {name} holds ")
    assert said.endswith(f'not a string; give it in quotes: --config.{field}="{quoted}".')
    values = cli.parse(["--config=configs/mini.py", f"--config.{field}={quoted}"], {}, required=())
    assert all(isinstance(text, str) for text in values.config[owner][name])
    assert not (tmp_path / "w").exists()


def test_a_flag_of_another_style_is_refused_with_the_right_one(capsys):
    words = ["--config=configs/stage2.py", "--topology=v5e:2x2", "--train_only"]
    assert aot.main(words) == 2
    assert "Did you mean: train-only ?" in capsys.readouterr().err
