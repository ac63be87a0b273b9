"""Progress of long runs: a bar on stderr, if that is a terminal and tqdm is installed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread beside what is timed
except ImportError:  # a run on a GPU needs torch, triton and pytest only
    tqdm = None


def progress(items: Sequence[Any], name: Callable[[Any], str] = str) -> Iterator[Any]:
    """Yields the items; the bar has the ``name`` of the one at work, and goes with the last."""
    if tqdm is None:
        yield from items
        return
    with tqdm(items, disable=None, leave=False) as bar:
        for item in bar:
            bar.set_description(name(item))
            yield item


def say(lines: str) -> None:
    """Prints lines above the bar, at once."""
    tqdm.write(lines) if tqdm else print(lines)
    sys.stdout.flush()
