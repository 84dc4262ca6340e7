"""What this process may use of its machine."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may run on, at least 1; in a container that may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
