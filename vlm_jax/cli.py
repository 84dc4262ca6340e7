"""What every command shares: flags with a config file behind them, and one-line errors with exit code 2.

Imports nothing heavy, so that a mistake on the command line is answered before jax wakes up.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlm_jax.config import ConfigError, RunEnded

PACKAGE = Path(__file__).resolve().parent
CONFIG_FLAG = re.compile(r"--?(?:no)?config(?:\.(?P<field>[^=]*))?(?:=(?P<value>.*))?$")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `command(argv)` (default: the process's arguments) and returns the exit code.

    What it returned (None: 0), or 0: a run was asked to end; 1: a run lost another process; 2: a ConfigError, the user's
    to mend. The one line of an error goes to stderr.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("vlm_jax", "__main__"):  # a command's own module runs as __main__
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # orbax calls every normal step of a restore a warning
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that PyTorch is absent is no news
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except ConfigError as error:
        return _tell(f"error: {error}", 2)
    except RunEnded as end:
        if end.exit_code == 0:
            return _tell(str(end), 0)
        _tell(f"error: {end}", end.exit_code)
        sys.stderr.flush()
        os._exit(end.exit_code)  # jax's farewell would wait for the processes that are gone


def _tell(text: str, exit_code: int) -> int:
    sys.stderr.write(" ".join(text.split()) + "\n")
    return exit_code


def parse(
    argv: Sequence[str],
    texts: Mapping[str, str],
    switches: Mapping[str, str] | None = None,
    required: Sequence[str] = ("config", "workdir"),
    positional: str = "",
) -> flags.FlagValues:
    """Flags `--config=FILE --config.x.y=VALUE`, one text flag per `texts`, one boolean per `switches` (name -> help).

    positional: the one of `texts` that may be given as a word without its `--name=`, anywhere among the flags.

    The result has an attribute per flag: `config` is the locked ConfigDict with the overrides applied (None when it was
    not given), a text flag that was not given is "". `required` flags must be given. Raises ConfigError for anything
    unknown, and SystemExit(0) after `--help`.
    """
    values = flags.FlagValues()
    argv = _with_config_found(argv)
    words = ["command", *argv]
    for name, meaning in texts.items():
        flags.DEFINE_string(name, "", meaning, flag_values=values)
    for name, meaning in (switches or {}).items():
        flags.DEFINE_boolean(name, False, meaning, flag_values=values)
    flags.DEFINE_boolean("help", False, "show the flags", short_name="h", flag_values=values)
    check_overrides(argv)
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a Python file with get_config(), or one of the package's own such as configs/stage1.py",
        flag_values=values,
        sys_argv=words,
    )
    try:
        rest = values(words)[1:]
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"command line: {error}") from error
    if values.help:
        lines = [
            f"--{name}: {values[name].help}\n" for name in ("config", *texts, *(switches or {}))
        ]
        sys.stdout.writelines(lines)
        raise SystemExit(0)
    if rest and positional and not values[positional].value:
        values[positional].value = rest.pop(0)
    if rest:
        raise ConfigError(f"command line: {rest[0]!r} is not a flag; write --name=value.")
    for name in required:
        if not values[name].value:
            raise ConfigError(f"command line: --{name} is missing; give --{name}=...")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's global flags and insist on this
    return values


def find_config(path: str) -> str:
    """`path` where that file exists, else the path of the package's own config of that name, else `path`.

    The own configs stand in configs/ beside the package in a checkout, and inside the package after `pip install`.
    """
    name, colon, text = path.partition(":")
    file = Path(name)
    if file.is_file() or file.parent not in (Path("."), Path("configs")):
        return path
    for folder in (PACKAGE.parent / "configs", PACKAGE / "bundled" / "configs"):
        own = folder / file.with_suffix(".py").name
        if own.is_file():
            return f"{own}{colon}{text}"
    return path


def _with_config_found(argv: Sequence[str]) -> list[str]:
    words = list(argv)
    for i, word in enumerate(words):
        match = CONFIG_FLAG.match(word)
        if match is None or match["field"]:
            continue
        if match["value"] is not None:
            words[i] = f"--config={find_config(match['value'])}"
        elif i + 1 < len(words):
            words[i + 1] = find_config(words[i + 1])
    return words


def load_config(path: str) -> ConfigDict:
    """The locked ConfigDict that `get_config()` of the file at `path` returns ("file.py:text" hands it the text).

    Raises ConfigError when the file is missing or broken.
    """
    path = find_config(path)
    file = Path(path.split(":", 1)[0])
    if not file.is_file():
        found = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = f"; found {', '.join(found)}" if found else ""
        raise ConfigError(f"--config: no file {str(file)!r}{hint}.")
    root = str(
        file.resolve().parent.parent
    )  # configs start from their neighbours: `from configs import default`
    if root not in sys.path:
        sys.path.append(root)
    values = flags.FlagValues()
    words = ["command", f"--config={path}"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
    except (
        flags.Error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        SyntaxError,
        ImportError,
    ) as error:
        raise ConfigError(
            f"--config: {file} does not load: {str(error).strip().splitlines()[-1]}"
        ) from error
    config = values["config"].value
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config: get_config() of {file} returns no ConfigDict; start from configs/default.py."
        )
    return config


def check_overrides(argv: Sequence[str]) -> None:
    """Raises ConfigError for the first `--config.x.y` whose field the config file does not have, naming its siblings."""
    path, fields = "", []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        match = CONFIG_FLAG.match(word)
        if match and match["field"]:
            fields.append(match["field"])
        elif match:
            path = following if match["value"] is None else match["value"]
    if fields and not path:
        raise ConfigError(f"command line: --config.{fields[0]} needs --config=FILE before it.")
    if not path:
        return
    config = load_config(path)
    for field in fields:
        node, walked = config, "config"
        for name in field.split("."):
            if not isinstance(node, ConfigDict) or name not in node:
                names = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no fields"
                raise ConfigError(
                    f"--config.{field}: {walked} has no field {name!r}; it has: {names}."
                )
            node, walked = node[name], f"{walked}.{name}"
