"""Config files: where they are found, and what they return. Imports nothing heavy."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlm_jax.settings.checks import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def find_config(path: str) -> str:
    """`path` if that file exists, else the path of the package's own config of that name, else `path`.

    The package's configs are in configs/ beside it in a checkout, and in vlm_jax/bundled/configs after `pip install`.
    """
    name, colon, text = path.partition(":")
    file = Path(name)
    if file.is_file() or file.parent not in (Path("."), Path("configs")):
        return path
    for folder in _own_folders():
        own = folder / file.with_suffix(".py").name
        if own.is_file():
            return f"{own}{colon}{text}"
    return path


def load_config(path: str) -> ConfigDict:
    """The locked ConfigDict that `get_config()` of the file at `path` returns ("file.py:text" hands it the text).

    Raises ConfigError when the file is missing or broken.
    """
    path = find_config(path)
    file = Path(path.split(":", 1)[0])
    if not file.is_file():
        folders = [file.parent] if file.parent != Path(".") else _own_folders()
        found = sorted(p.name for folder in folders for p in folder.glob("[!_]*.py"))
        hint = f"; {folders[0]} has {', '.join(found)}" if found else ""
        raise ConfigError(f"--config: no file {str(file)!r}{hint}.")
    # Config files contain `from configs import default`; of ours, that is the folder they lie in, whatever lies here.
    root = str(file.resolve().parent.parent)
    if file.resolve().parent in _own_folders() and sys.path[0] != root:
        sys.path.insert(0, root)
    elif root not in sys.path:
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


def _own_folders() -> list[Path]:
    return [f for f in (PACKAGE.parent / "configs", PACKAGE / "bundled" / "configs") if f.is_dir()]
