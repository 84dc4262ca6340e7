"""Requests to stop: SIGTERM (preemption, a time limit) or Ctrl-C end a run after the current step."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """A context manager that handles the signals; it must be entered in the main thread.

    One process: the first SIGTERM or SIGINT requests the stop, further SIGTERMs are ignored, and a second SIGINT ends the
    process at once. Several processes: signals arrive at different times, so the processes must agree on a step. JAX's
    preemption service, which handles SIGTERM since `jax.distributed.initialize`, does that; SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self._joined = jax.distributed.is_initialized()
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        kinds = (signal.SIGINT,) if self._joined else (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def __exit__(self, *reason: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, kind: int, frame: FrameType | None) -> None:
        self._asked = True
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._joined:
                os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; the answer is the same in every process. Call it once after each step.

        Until a stop is requested it costs one lock, without any communication.
        """
        if self._joined:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
