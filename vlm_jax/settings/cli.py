"""The command line of every command: flags, the config file and its overrides, one-line errors with exit code 2.

Imports nothing heavy, so that a mistake on the command line is reported before jax is loaded.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import keyword
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlm_jax.settings import addresses, logs
from vlm_jax.settings.checks import ConfigError, RunEnded
from vlm_jax.settings.config_files import find_config, load_config

CONFIG_FLAG = re.compile(r"--?(?:no)?config(?:\.(?P<field>[^=]*))?(?:=(?P<value>.*))?$", re.DOTALL)
# A block whose fields depend on its `name`: the file lists those of its own choice, and who reads the block knows the rest.
OPEN_BLOCK = "model.compressor"
HELP_FLAG = re.compile(r"(--?help(full|short)?|-h)(=true)?$")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Calls `command(argv)` (default: the process's arguments) and returns the exit code.

    The exit code is what `command` returned (None: 0); that of a RunEnded: 0 when the run was asked to end, 1 when it lost
    another process; or 2 after a ConfigError, or a bucket that failed. An error is one line on stderr.
    """
    logs.start()
    words = sys.argv[1:] if argv is None else argv
    try:
        addresses.check_words(words)
        return command(words) or 0
    except ConfigError as error:
        return _tell(f"error: {error}", 2)
    except OSError as error:
        if not addresses.scheme(str(error.filename)):
            raise
        return _tell(f"error: {error.filename}: {error.strerror}.", 2)
    except RunEnded as end:
        if end.exit_code == 0:
            return _tell(str(end), 0)
        _tell(f"error: {end}", end.exit_code)
        sys.stderr.flush()
        os._exit(end.exit_code)  # jax's shutdown would wait for processes that no longer exist


def _tell(text: str, exit_code: int) -> int:
    sys.stderr.write(" ".join(text.split()) + "\n")
    return exit_code


def parse(
    argv: Sequence[str],
    texts: Mapping[str, str],
    switches: Mapping[str, str] | None = None,
    required: Sequence[str] = ("config", "workdir"),
    positional: str = "",
    about: str = "",
) -> flags.FlagValues:
    """Flags `--config=FILE --config.x.y=VALUE`, one text flag per `texts`, one boolean per `switches` (name -> help).

    positional: the one of `texts` that may be given without its `--name=`, anywhere among the flags.
    about: the beginning of `--help`, usually a command's docstring.

    The result has one attribute per flag. `config` is the locked ConfigDict with the overrides applied, None when it was not
    given; a text flag that was not given is "". `required` flags must be given. A flag that is given twice has its
    last value. Raises ConfigError for anything unknown, and SystemExit(0) after `--help`.
    """
    example = re.search(r"--config=(\S+)", about)
    config_help = f"a file of configs/, such as {example[1] if example else 'configs/stage1.py'}"
    meanings = {"config": config_help, **texts, **(switches or {})}
    if any(HELP_FLAG.match(word) for word in argv):
        sys.stdout.write(help_text(argv, meanings, required, positional, about))
        raise SystemExit(0)
    values = flags.FlagValues()
    argv = _with_config_found(argv)
    for name, meaning in texts.items():
        flags.DEFINE_string(name, "", meaning, flag_values=values)
    for name, meaning in (switches or {}).items():
        flags.DEFINE_boolean(name, False, meaning, flag_values=values)
    flags.DEFINE_boolean("help", False, "show the flags", short_name="h", flag_values=values)
    config = check_overrides(argv)
    kept, late = _late_fields(last_of_each(argv, config), config)
    words = ["command", *kept]
    config_flags.DEFINE_config_file("config", None, config_help, flag_values=values, sys_argv=words)
    try:
        rest = values(words)[1:]
    except flags.UnrecognizedFlagError as error:
        near = _nearest(f"--config.{error.flagname}", config)
        hint = f". Did you mean: {' or '.join(near)} ?" if near and "mean" not in str(error) else ""
        raise ConfigError(f"command line: {error}{hint}; --help lists every flag.") from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        # Of a boolean, absl prints a tuple.
        reason = re.sub(r"\('(.*?)', '(.*?)'\)$", r"\1: \2", str(error))
        raise ConfigError(
            f"command line: {reason}; --help shows each field with its value."
        ) from error
    for field, value in late.items():
        with values.config.unlocked():
            values.config.update_from_flattened_dict({field: value})
    if rest and positional and not values[positional].value:
        values[positional].value = rest.pop(0)
    if rest:
        raise ConfigError(f"command line: {rest[0]!r} is not a flag; write --name=value.")
    missing = [name for name in required if not values[name].value]
    if missing:
        named = " and ".join(f"--{name}" for name in missing)
        raise ConfigError(
            f"command line: {named} {'is' if len(missing) == 1 else 'are'} missing "
            f"({'; '.join(meanings[name] for name in missing)}); {usage(required, positional)}; --help says more."
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's global flags and insist on this
    return values


class OneLineParser(argparse.ArgumentParser):
    """argparse with the errors of `parse`: one line on stderr with the usage in it, exit code 2."""

    def __init__(self, **settings: Any):
        super().__init__(prog=program(), **settings)

    def error(self, message: str):
        required = [
            action.option_strings[0]
            if action.option_strings
            else str(action.metavar or action.dest)
            for action in self._actions
            if action.required
        ]
        raise ConfigError(
            f"command line: {message}; usage: {' '.join([self.prog, *required])} ..; --help lists every flag."
        )


def program() -> str:
    """How the running command was called: "python -m vlm_jax.train", or its console script."""
    path = Path(sys.argv[0])
    if path.suffix != ".py":
        return path.name
    parts = path.with_suffix("").parts
    if "vlm_jax" not in parts:
        return f"python {sys.argv[0]}"
    inside = [part for part in parts[parts.index("vlm_jax") :] if part != "__main__"]
    return f"python -m {'.'.join(inside)}"


def usage(required: Sequence[str], positional: str = "") -> str:
    """The shortest call of the running command, in one line."""
    shown = {"config": "--config=configs/FILE.py", "workdir": "--workdir=DIR"}
    words = [
        name.upper() if name == positional else shown.get(name, f"--{name}={name.upper()}")
        for name in required
    ]
    more = ["[--config.FIELD=VALUE ..]"] if "config" in required else []
    return " ".join(["usage:", program(), *words, *more])


def help_text(
    argv: Sequence[str],
    meanings: Mapping[str, str],
    required: Sequence[str],
    positional: str,
    about: str,
) -> str:
    """The usage, the description, the flags and, when `argv` names a config file, the fields of that file."""
    width = max(len(name) for name in meanings) + 4
    lines = [usage(required, positional), "", *about.strip().splitlines(), ""]
    lines += [f"{f'--{name}:':{width}}{meaning}" for name, meaning in meanings.items()]
    path = _config_path(argv)
    if not path:
        lines += ["", "With --config=FILE before --help: every field of that file and its value."]
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"--config.FIELD=VALUE, the fields of {path} (configs/default.py says what each means):",
    ]
    for name, value in _leaves(load_config(path)).items():
        lines.append(f"  --config.{name}={value if value != '' else repr(value)}")
    return "\n".join(lines) + "\n"


def given_fields(argv: Sequence[str]) -> tuple[str, ...]:
    """The fields that a command line sets: "model.lm.preset" for `--config.model.lm.preset=..`."""
    matches = (CONFIG_FLAG.match(word) for word in argv)
    return tuple(dict.fromkeys(match["field"] for match in matches if match and match["field"]))


def last_of_each(argv: Sequence[str], config: ConfigDict | None) -> list[str]:
    """`argv` with the config file first and, for each `--config.x.y`, only the last value.

    ml_collections would otherwise concatenate the values of a tuple that is given twice.
    """
    leaves = _leaves(config) if config is not None else {}
    kept: dict[str, list[str]] = {}
    words = iter(argv)
    for place, word in enumerate(words):
        match = CONFIG_FLAG.match(word)
        key = f"config.{match['field'] or ''}" if match else f"word {place}"
        group = [word]
        needs_value = match is not None and match["value"] is None
        if match and needs_value and not isinstance(leaves.get(match["field"] or ""), bool):
            group += [following for following in [next(words, None)] if following is not None]
        kept.pop(key, None)
        kept[key] = group
    first = kept.pop("config.", [])
    return [*first, *(word for group in kept.values() for word in group)]


def _late_fields(
    words: Sequence[str], config: ConfigDict | None
) -> tuple[list[str], dict[str, Any]]:
    """The words without those that ml_collections refuses, and the values of these fields.

    It reads a field's path as Python, and so refuses a text field named by a keyword (init.from); and it knows no fields of
    OPEN_BLOCK beside those in the file, which are read as Python literals, else as text.
    """
    kept: list[str] = []
    late: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        match = CONFIG_FLAG.match(word)
        field = match["field"] if match else None
        if match and field and any(keyword.iskeyword(name) for name in field.split(".")):
            late[field] = next(rest, "") if match["value"] is None else match["value"]
        elif match and field and _is_open(field, config):
            late[field] = _literal(next(rest, "") if match["value"] is None else match["value"])
        else:
            kept.append(word)
    return kept, late


def _is_open(field: str, config: ConfigDict | None) -> bool:
    """Whether a field lies in OPEN_BLOCK and is not in the file."""
    block, _, name = field.rpartition(".")
    if block != OPEN_BLOCK or config is None or "model" not in config:
        return False
    return name not in config.model.get("compressor", {name: None})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _config_path(argv: Sequence[str]) -> str:
    """The value of the last `--config`; "" without one."""
    path = ""
    for word, following in zip(argv, [*argv[1:], ""][: len(argv)], strict=True):
        match = CONFIG_FLAG.match(word)
        if match and not match["field"]:
            path = following if match["value"] is None else match["value"]
    return path


def _leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted name -> value of every field; the value is None where a preset supplies it."""
    found: dict[str, object] = {}
    for name in config:
        value = config[name]
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else None
        found |= {f"{prefix}{name}": value} if inner is None else inner
    return found


def _nearest(field: str, config: ConfigDict | None) -> list[str]:
    """Up to two flags that a wrong one may have meant: fields of that name in other blocks, else similar names."""
    if config is None:
        return []
    names, wrong = list(_leaves(config)), field.removeprefix("--config.")
    last = wrong.rsplit(".", 1)[-1]
    same = [name for name in names if name == wrong or name.rsplit(".", 1)[-1] == last]
    if not same:
        same = difflib.get_close_matches(wrong, names, 2, 0.75)
    if not same:
        ends = {name.rsplit(".", 1)[-1]: name for name in names}
        same = [ends[end] for end in difflib.get_close_matches(last, ends, 2, 0.75)]
    return [f"--config.{name}" for name in same[:2]]


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


def check_overrides(argv: Sequence[str]) -> ConfigDict | None:
    """The config without its overrides; None when no file is given.

    Raises ConfigError for the first `--config.x.y` whose field the file does not have, naming its siblings and the
    fields that are spelt alike.
    """
    path, fields = _config_path(argv), given_fields(argv)
    if fields and not path:
        raise ConfigError(
            f"command line: --config.{fields[0]} needs --config=FILE before it, such as --config=configs/stage1.py."
        )
    if not path:
        return None
    config = load_config(path)
    for field in fields:
        if _is_open(field, config):
            continue
        node, walked = config, "config"
        for name in field.split("."):
            if not isinstance(node, ConfigDict) or name not in node:
                names = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "no fields"
                near = " or ".join(_nearest(f"--config.{field}", config))
                raise ConfigError(
                    f"--config.{field}: {walked} has no field {name!r}; it has: {names}."
                    + (f" Did you mean {near} ?" if near else "")
                )
            node, walked = node[name], f"{walked}.{name}"
        if isinstance(node, ConfigDict):
            raise ConfigError(
                f"--config.{field}: {walked} is a block, not a field; set one of: {', '.join(sorted(node))}."
            )
    return config
