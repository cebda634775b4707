"""What holds for all tests."""

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell of a failure at once: should the whole of pytest be killed later, its summary never comes."""
    if report.failed:
        text = f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}\n{report.capstdout[-6000:]}\n"
        print(text, file=sys.__stderr__, flush=True)
