"""Where the tests stand, for those that start a process of their own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
# What pyproject.toml gives pytest, for a PYTHONPATH.
PYTHONPATH = ":".join(
    str(ROOT / path) for path in ("", "tests", "tests/helpers", "tests/hf", "tests/models")
)
