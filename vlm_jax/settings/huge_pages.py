"""Large arrays in huge pages on Linux, which makes a training step on a CPU up to a quarter faster (docs/performance.md).

XLA allocates a step's buffers anew each time, and the kernel clears them page by page. With pages of 2 MB instead of 4 KB it is
interrupted 500 times less. glibc asks for them only if GLIBC_TUNABLES says so when a process starts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def use() -> None:
    """Restarts this `python -m vlm_jax..` command with huge pages, once; the process keeps its id.

    Does nothing where the kernel gives none on request, where GLIBC_TUNABLES already says something about them (0: none), and
    in a program that only imports this package.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == __name__.partition(".")[0]:
        restart()


def restart() -> None:
    """`use`, for whatever program this is: it must not have done anything yet."""
    given = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or not KERNEL.is_file() or "[madvise]" not in KERNEL.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, f"{TUNABLE}=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
