"""Pickled weights to safetensors, with torch, in its mode that loads nothing but tensors."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from typing import Any

from vlm_jax.files import Path, copy, whole_folder, write_whole
from vlm_jax.hf import directory
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger(__name__)

PICKLED_INDEX, PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def unpickle(given: Path, out: Path) -> None:
    """Writes `out` as the directory `given` with its pickled weights as safetensors files of the same names.

    The weights are the files that pytorch_model.bin.index.json names, else pytorch_model.bin, else the only pickle there is.
    Other pickles (a projector beside its model, a trainer's arguments and optimizer) and the weights of other frameworks are
    not copied; everything else is. An error leaves no partial `out`. Raises ConfigError for a file that is missing, damaged
    or holds more than tensors.
    """
    files = _weight_files(given)
    pickles = {path for pattern in directory.PICKLES for path in given.glob(pattern)}
    listed: dict[str, str] = {}
    with whole_folder(out) as partial:
        for path in files:
            name = f"{path.stem}.safetensors"
            tensors = _write(path, partial / name)
            twice = sorted(tensors & listed.keys())
            if twice:
                raise ConfigError(f"{twice[0]} stands in {listed[twice[0]]} and in {name}.")
            listed |= dict.fromkeys(sorted(tensors), name)
        _check_index(given, listed)
        index = {"metadata": {}, "weight_map": listed}
        write_whole(partial / directory.INDEX, json.dumps(index, indent=2) + "\n")
        for path in given.iterdir():
            weights = any(path.match(pattern) for pattern in directory.WEIGHTS)
            if path.is_file() and not weights and path.name != PICKLED_INDEX:
                copy(path, partial / path.name)
    behind = sorted(path.name for path in pickles - set(files))
    log.info(
        "%s: %d files of weights%s", out, len(files), f"; left behind: {', '.join(behind)}" if behind else ""
    )  # fmt: skip


def _weight_files(given: Path) -> list[Path]:
    if not given.is_dir():
        raise ConfigError(f"{str(given)!r} is no directory.")
    if any(given.glob("*.safetensors")):
        raise ConfigError(f"{str(given)!r} holds safetensors files already; use it as it is.")
    if (given / PICKLED_INDEX).is_file():
        return directory.indexed_files(given / PICKLED_INDEX)
    if (given / PICKLED_SINGLE).is_file():
        return [given / PICKLED_SINGLE]
    found = sorted(path for pattern in directory.PICKLES for path in given.glob(pattern))
    if len(found) == 1:
        return found
    names = ", ".join(path.name for path in found)
    raise ConfigError(
        f"{str(given)!r} has neither {PICKLED_INDEX} nor {PICKLED_SINGLE}"
        + (f", but {names}; keep the one that holds the weights." if found else "; download the weights too.")
    )  # fmt: skip


def _write(path: Path, out: Path) -> set[str]:
    """The names of the tensors of one pickle, after writing them to a safetensors file."""
    import torch  # needed for this conversion only
    from safetensors.torch import save_file

    try:
        # torch before 1.6 did not write the zip files that can be mapped into memory.
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # fmt: skip
    except Exception as error:  # torch raises what the pickle makes it raise
        raise ConfigError(
            f"{str(path)!r} cannot be read as plain weights: {_reason(error)}"
        ) from None
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_quantized
        for name, x in tensors.items()
    )  # fmt: skip
    if not plain or not tensors:
        raise ConfigError(f"{str(path)!r} holds more than tensors; it is no model's weights.")
    # Tied weights share memory in a pickle, which safetensors refuses: each tensor gets its own.
    own = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    save_file(own, out, metadata={"format": "pt"})
    return set(own)


def _reason(error: Exception) -> str:
    """torch's message in one line without colours, and without its advice to load the file unsafely."""
    text = " ".join(ESCAPES.sub("", str(error)).split())
    code = re.search(r"GLOBAL (\S+)", text)
    if code:
        return f"it asks for {code[1]}, which is no tensor."
    text = text or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_index(given: Path, listed: dict[str, str]) -> None:
    """Raises ConfigError for tensors that the index names and no file holds."""
    if not (given / PICKLED_INDEX).is_file():
        return
    missing = sorted(set(directory.weight_map(given / PICKLED_INDEX)) - set(listed))
    if missing:
        raise ConfigError(
            f"{str(given / PICKLED_INDEX)!r} names {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
            f"({len(missing)} tensors), which its files do not hold; download them again."
        )
