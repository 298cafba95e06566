"""`make test`: the suite, and then once more, alone, the few tests that failed beside others.

Hundreds of tests start processes, cut connections and wait on two cores that they share. One that fails there and alone
fails the run; one that passes alone is named, and is a defect of the test or of the product all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_FAILURES = 10
"""More than so many are no accident."""


class Failures:
    """Which tests failed, in whatever process of pytest-xdist. Arguments of pytest name them relative to `root`."""

    def __init__(self) -> None:
        self.root, self.names = Path(), dict[str, None]()

    def pytest_configure(self, config: pytest.Config) -> None:
        self.root = config.rootpath

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names[without_group(report.nodeid)] = None


def without_group(nodeid: str) -> str:
    """A test's name without its xdist_group, which --dist loadgroup writes behind it."""
    return nodeid.rpartition("@")[0] if nodeid.rfind("@") > nodeid.rfind("]") else nodeid


def main(arguments: list[str]) -> int:
    """Exit status of pytest."""
    environment, failures = dict(os.environ), Failures()
    status = int(pytest.main(arguments, plugins=[failures]))
    if status != pytest.ExitCode.TESTS_FAILED or not 0 < len(failures.names) <= MOST_FAILURES:
        return status
    print("\nFailed beside others, and run once more, alone:", *failures.names, "", sep="\n", flush=True)
    again = [sys.executable, "-m", "pytest", "-n", "0", "-v", *failures.names]
    return subprocess.run(again, cwd=failures.root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
