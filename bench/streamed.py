"""A pytest plugin (``-p bench.streamed``): each test's outcome is on disk when the next one begins.

A JUnit file is written at the end, which a run that is cut off or hangs never reaches.
"""

from __future__ import annotations

import os
from pathlib import Path

from .disk import Table

#: The environment variables that say where to, and what stands in the first column.
PATH, GROUP = "FUSEDRNN_TESTS_CSV", "FUSEDRNN_TESTS_GROUP"
COLUMNS = ("group", "test", "outcome", "seconds", "message")


class Streamed:
    def __init__(self, path: Path, group: str):
        self.table, self.group = Table(path, COLUMNS), group

    def pytest_runtest_logreport(self, report) -> None:
        # A test that passes says so in its call; one that fails or is skipped, in any phase.
        if report.when == "call" or not report.passed:
            lines = str(report.longrepr or "").strip().splitlines()
            message = lines[-1] if lines else ""
            self.table.add((self.group, report.nodeid, report.outcome, report.duration, message))


def pytest_configure(config) -> None:
    # Under pytest-xdist the controller hears of every test; its workers need not repeat it.
    if PATH in os.environ and not hasattr(config, "workerinput"):
        plugin = Streamed(Path(os.environ[PATH]), os.environ.get(GROUP, ""))
        config.pluginmanager.register(plugin)
