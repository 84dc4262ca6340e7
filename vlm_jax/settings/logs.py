"""What the processes of a command write to stderr while they work."""

from __future__ import annotations

import logging
import os
import sys


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress bar replaces it, so that lines stand above the bar."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


def start() -> None:
    """Shows the lines of this package, and of other libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Stderr()])
    for name in ("vlm_jax", "__main__"):  # a command's own module runs as __main__
        logging.getLogger(name).setLevel(logging.INFO)
    quieten()


def quieten() -> None:
    """Silences what other libraries log about normal work."""
    # orbax logs normal steps of a restore as warnings, and transformers warns that PyTorch is not installed.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
