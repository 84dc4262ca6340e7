"""What a command shows while it works: lines given to a function, and a progress bar where there is a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Say = Callable[[str], None]  # is given one line at a time


def silent(line: str) -> None:
    """For callers that want no lines."""


class Bar:
    """A progress bar on stderr with a text behind it; without a terminal nothing is shown."""

    def __init__(self, name: str, total: int, done: int = 0, text: str = "", shows: bool = True):
        """shows: False on all processes but the first."""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        self.is_shown = shows and console.is_terminal
        self._progress = Progress(*columns, console=console, disable=not self.is_shown)
        self._task = self._progress.add_task(name, total=total, completed=done, text=text)
        self._progress.start()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._progress.advance(self._task, count)

    def update(self, done: int, text: str) -> None:
        """`done` of the total are done."""
        self._progress.update(self._task, completed=done, text=text)

    def close(self) -> None:
        self._progress.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
