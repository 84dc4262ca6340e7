"""Being asked to stop: SIGTERM (preemption, a time limit) or Ctrl-C end a run after the step under way."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Listens while it is entered; must be entered in the main thread.

    One process: the first SIGTERM or SIGINT asks to stop; further SIGTERMs change nothing, another SIGINT ends the
    process at once. Several processes: signals reach them at different times, so jax's own service, which took SIGTERM
    when the processes joined, agrees on a step in the background; SIGINT is handed on to it.
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
        """Whether this step is the last one, the same step in every process; to be called after each step, in order.

        Costs a lock (no message, no wait) as long as nobody was asked.
        """
        if self._joined:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
