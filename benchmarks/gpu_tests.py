"""A plug-in for pytest that keeps each outcome as soon as it is known: pytest -p gpu_tests --outcomes FILE.

Tests that have passed according to FILE are left out, so that a run that was cut off goes on.
"""

from pathlib import Path

import pytest
from results import Results


def pytest_addoption(parser) -> None:
    parser.addoption("--outcomes", type=Path)


def pytest_configure(config) -> None:
    config.outcomes = Results(config.getoption("outcomes"))
    if not hasattr(config, "workerinput"):  # of several processes the one that started the others
        config.pluginmanager.register(Keeper(config.outcomes))


def pytest_collection_modifyitems(config, items) -> None:
    rows = config.outcomes.rows
    items[:] = [item for item in items if rows.get(item.nodeid, {}).get("outcome") != "passed"]


class Keeper:
    """Writes a row a test: its outcome, seconds, and what went wrong."""

    def __init__(self, outcomes: Results):
        self.outcomes = outcomes

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.outcomes.rows:
            session.exitstatus = pytest.ExitCode.OK  # all have passed

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:  # a fixture that fails or skips ends a test, too
            row = {"outcome": report.outcome, "seconds": report.duration}
            self.outcomes.add(report.nodeid, row if report.passed else row | {"why": str(report.longrepr)[-2000:]})
