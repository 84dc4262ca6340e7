"""The errors a user can mend, and the checks that settings share. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A setting or an input the user can mend; its text is one line that names the fix."""


class RunEnded(Exception):
    """A run stopped early, but not because of its settings.
    exit_code: 0 when it was asked to, else 1 or 2: nothing is closed then, because closing would wait for what is gone.
    """

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


Config = TypeVar("Config")


def build(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """`cls(**fields)`, with unknown and missing names turned into a ConfigError that lists the allowed ones."""
    known = {f.name: f for f in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(
            f"{cls.__name__}: unknown field {unknown[0]!r}; allowed: {', '.join(known)}."
        )
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in fields]
    if missing:
        raise ConfigError(
            f"{cls.__name__}: field {missing[0]!r} has no value; set it or name a preset."
        )
    several = {n for n, f in known.items() if str(f.type).startswith("tuple")}
    listed = {k: (v,) if k in several and isinstance(v, str) else v for k, v in fields.items()}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()})


def check_choice(owner: str, field: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise ConfigError(f"{owner}: {field} {value!r} is not one of {sorted(allowed)}.")


def check_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{owner}: {name} must be positive, got {value!r}.")
        if value == math.inf:
            raise ConfigError(f"{owner}: {name} must be finite, got {value!r}.")
