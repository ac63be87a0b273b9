"""A progress bar on stderr: tqdm's if it is installed, and none where nobody watches."""

from __future__ import annotations

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Counts steps of work of any kind; silent without tqdm or when stderr is no terminal."""

    def __init__(self, total: int | None):
        """``total`` None is silence."""
        form = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining} {desc}"
        shown = tqdm is not None and total is not None
        self._bar = tqdm(total=total, disable=None, leave=False, bar_format=form) if shown else None

    def at(self, what: str) -> None:
        """Says what is being done now."""
        if self._bar is not None:
            self._bar.set_description_str(what)

    def tick(self, steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def say(self, line: str) -> None:
        """Prints to stdout without tearing the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
