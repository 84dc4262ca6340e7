"""The sides of a comparison, each in a process of its own, which take turns: a busy machine is busy for all of them.

In one process torch's threads would hold cores while jax computes. Ours begins as this package's commands do, with arrays in
huge pages; the others begin as a user's script does, for huge pages make torch slower.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlm_jax.settings import huge_pages


class Side(NamedTuple):
    """make(*arguments) is called once, in the side's process, and returns the function that each turn calls."""

    make: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...]
    is_ours: bool


def begin() -> None:
    """To be called first in a program's main function: starts it again with huge pages, where the kernel gives them."""
    huge_pages.restart()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share a GPU


def take(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Any]]:
    """What each side's turns give, one turn per round, in the order of `sides`."""
    context = multiprocessing.get_context("spawn")
    ours = os.environ.get("GLIBC_TUNABLES", "")
    pipes, processes = {}, []
    for name, side in sides.items():
        os.environ["GLIBC_TUNABLES"] = ours if side.is_ours else f"{huge_pages.TUNABLE}=0"
        pipes[name], its = context.Pipe()
        processes.append(context.Process(target=_play, args=(side, its)))
        processes[-1].start()
        its.close()  # a process that dies is noticed
    os.environ["GLIBC_TUNABLES"] = ours
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return found


def _play(side: Side, connection: Any) -> None:
    turn = side.make(*side.arguments)
    while connection.recv():
        connection.send(turn())
    connection.close()
