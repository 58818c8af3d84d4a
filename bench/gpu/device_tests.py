"""The tests that need a device, in as few processes as it takes for none to hide the next.

    python -m bench device-tests --json OUT.json

An error of CUDA spoils a process, so that every test after it fails too: the process ends there, and another one goes
on with the next test. So it does where a test kills the process, or takes longer than `--test-timeout`. The outcome of
each test is written as it comes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu.outcomes_plugin import OUTCOMES
from bench.options import bench_parser
from bench.result import result_document
from rq_ep.core.errors import check_integer
from rq_ep.core.files.documents import check_writable, write_json

MAX_PROCESSES = 12


def main(argv: Sequence[str]) -> int:
    """Run the tests; print what failed. Returns 1 if something did."""
    made = bench_parser("device-tests", __doc__)
    made.add_argument("--tests", nargs="+", default=["tests/gpu"], metavar="PATH", help="as of pytest")
    made.add_argument("--marker", default="gpu", metavar="NAME", help="of the tests to run")
    made.add_argument("--test-timeout", type=int, default=60, metavar="S", help="of one test")
    made.add_argument("--json", metavar="FILE", help="write the outcomes there, process by process")
    options = made.parse_args(argv)
    check_integer("--test-timeout", options.test_timeout, 1)
    if options.json:
        check_writable(options.json)
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rq_ep-") as directory:
        for _ in range(MAX_PROCESSES):
            ended = _run(options, list(outcomes), Path(directory) / "outcomes")
            outcomes |= ended
            if options.json:
                counts = Counter(outcome["outcome"] for outcome in outcomes.values())
                write_json(
                    options.json, result_document("device-tests", argv, options, counts=counts, outcomes=outcomes)
                )
            if not any(outcome["spoils"] for outcome in ended.values()):
                break
    return _show(outcomes)


def _run(options: argparse.Namespace, done: Sequence[str], path: Path) -> dict[str, dict[str, Any]]:
    """One process, with the tests that are not done: outcome, seconds and message of each that it came to."""
    path.write_text("")
    command = [sys.executable, "-m", "pytest", *options.tests, "-m", options.marker, "-q", "-W", "default"]
    command += ["-p", "bench.gpu.outcomes_plugin", "-p", "no:cacheprovider", f"--timeout={options.test_timeout}"]
    command += ["--timeout-method=thread", *(f"--deselect={name}" for name in done)]
    subprocess.run(command, env={**os.environ, OUTCOMES: str(path)}, check=False, stdout=subprocess.DEVNULL)
    outcomes: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        name, outcome = json.loads(line)
        outcomes[name] = outcome
    return outcomes


def _show(outcomes: dict[str, dict[str, Any]]) -> int:
    bad = {name: outcome for name, outcome in outcomes.items() if outcome["outcome"] in ("failed", "died")}
    counts = Counter(outcome["outcome"] for outcome in outcomes.values())
    console = Console(soft_wrap=True, highlight=False)
    console.print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "no tests", markup=False)
    for name, outcome in bad.items():
        lines = outcome["message"].strip().splitlines()
        reason = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
        console.print(f"{outcome['outcome']}: {name}: {reason}", markup=False)
    return 1 if bad else 0
