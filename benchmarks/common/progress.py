"""How far a benchmark is, and how long it will take: a bar in a terminal, else lines."""

import time
from typing import Self

from rich import progress
from rich.console import Console

QUIET = 20.0  # seconds between two lines about the same work


class Progress:
    """Counts steps of work on the standard error stream.

    Args:
      total: the number of steps.
      description: what is done first.
    """

    def __init__(self, total: int, description: str = ""):
        self.terminal = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = progress.Progress(
            *progress.Progress.get_default_columns(),
            console=self.terminal,
            transient=True,
            disable=not self.terminal.is_terminal,
        )
        self.total, self.done, self.description = total, 0, description
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task(self.description, total=self.total)
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def describe(self, description: str):
        """Says what is done from now on."""
        self.description = description
        self.bar.update(self.task, description=description)
        self._say()

    def advance(self, steps: int = 1):
        """Counts steps that are done."""
        self.done += steps
        self.bar.advance(self.task, steps)
        if time.monotonic() > self.said + QUIET:
            self._say()

    def _say(self):
        if not self.terminal.is_terminal:
            self.said = time.monotonic()
            text = f"{self.description}: {self.done} of {self.total} done{self._estimate()}"
            self.terminal.print(text, markup=False)

    def _estimate(self) -> str:
        if not self.done:
            return ""
        left = (self.said - self.began) / self.done * (self.total - self.done)
        return f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
