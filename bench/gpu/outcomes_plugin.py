"""A plugin of pytest: writes the outcome of each test as it comes, ends a process that an error of CUDA spoils."""

import json
import os
from typing import Any

OUTCOMES = "RQ_EP_TEST_OUTCOMES"  # the environment names the file: a line of [test, outcome] each
SPOILS = ("CUDA error", "CUDA driver error", "device-side assert")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Until the test ends, the outcome is that it killed its process."""
    _note(nodeid, {"outcome": "died", "spoils": True, "message": "the process ended"})


def pytest_runtest_logreport(report: Any) -> None:
    """Note how a test ended; after an error of CUDA end the process."""
    if report.when != "call" and report.outcome == "passed":
        return
    message = "" if report.outcome == "passed" else str(report.longrepr)[-2000:]
    spoils = report.outcome == "failed" and any(text in message for text in SPOILS)
    _note(
        report.nodeid,
        {"outcome": report.outcome, "spoils": spoils, "message": message, "seconds": round(report.duration, 3)},
    )
    if spoils:
        os._exit(1)


def _note(name: str, outcome: dict[str, Any]) -> None:
    with open(os.environ[OUTCOMES], "a") as file:
        file.write(json.dumps([name, outcome]) + "\n")
