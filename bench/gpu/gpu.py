"""All evidence that one device gives, stage by stage, inside a time limit.

    bash bench/gpu.sh                            # installs what a bare machine lacks, then runs this
    python -m bench gpu --minutes 9 --out runs/gpu
    python -m bench gpu --device cpu --quick --stages formats decode

Each stage is a bench in a process of its own with a limit of seconds. What it prints goes to NAME.log and its figures
to NAME.json as they come; `summary.json` says after every stage how each ended. Ended at any moment, what was measured
is there. The most valuable stages come first.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bench.options import bench_parser, check_device
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import check_choice, check_number
from rq_ep.core.files.documents import write_json

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
GRACE_S = 5  # between asking a stage to end and killing it


class Stage(NamedTuple):
    """A bench with its options on a device, with shorter ones for `--quick`, and the seconds that it may take."""

    bench: str
    options: str
    quick: str
    limit_s: int


FEW, MANY = "1 4 16 64", "256 1024 4096"
STAGES = {
    "tests": Stage("device-tests", "", "--tests tests/gpu/test_kernels.py", 150),
    "formats": Stage(
        "formats",
        f"--scale 1 --rounds 7 --shapes mixtral qwen3-moe gpt-oss-120b deepseek-v3 --rows {FEW} {MANY}",
        "--shapes tiny --scale 1 --rows 1 --experts 2 --rounds 2 --formats int8",
        100,
    ),
    "layer": Stage(
        "layer",
        "--local-ranks 8 --shape gpt-oss-120b --dtype bfloat16 --formats bf16,int8 --scenarios llep --machine h200 "
        "--tokens-per-rank 8192 --steps 4 --strategies standard,eplb,llep,rq,rq_llep",
        "--local-ranks 2 --shape tiny --scenarios 80:2 --tokens-per-rank 32 --steps 1 --strategies standard,rq",
        130,
    ),
    "decode": Stage(
        "decode",
        "--shape qwen3-moe --layers 12 --formats bf16 int8 int4_g128",
        "--shape tiny --layers 1 --prompts 1 --input-len 8 --output-len 2 --runs 1 --formats int8",
        170,
    ),
    "waits": Stage("waits", "", "--shape tiny --local-ranks 2 --tokens-per-rank 16 --strategies standard", 40),
    "staging": Stage("staging", "", "--shape tiny --rows 4 --rounds 2 --calls 2", 40),
}


def main(argv: Sequence[str]) -> int:
    """Run the stages; print how each ended. Returns 1 if one failed.

    Raises:
        UserError: an option makes no sense.
    """
    made = bench_parser("gpu", __doc__)
    made.add_argument("--stages", nargs="+", default=list(STAGES), metavar="NAME", help="which, in this order")
    made.add_argument("--minutes", type=float, default=9, metavar="N", help="for all stages together")
    made.add_argument("--out", default="runs/gpu", metavar="DIR", help="where results and logs go")
    made.add_argument("--device", default="cuda", metavar="NAME", help="cuda or cpu")
    made.add_argument("--quick", action="store_true", help="tiny sizes: only whether every stage runs")
    options = made.parse_args(argv)
    for name in options.stages:
        check_choice("stage", name, STAGES)
    check_device(options.device)
    check_number("--minutes", options.minutes, 0)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    for name in options.stages:
        rows.append({"stage": name, **_run(name, options, out, end_s)})
        write_json(out / "summary.json", result_document("gpu", argv, options, options.device, rows=rows))
        print(f"{name}: {rows[-1]['end']} after {rows[-1]['seconds']:.0f} s", flush=True)
    _show(rows, out)
    return 0 if all(row["end"] == "done" for row in rows) else 1


def _run(name: str, options: argparse.Namespace, out: Path, end_s: float) -> dict[str, Any]:
    """How a stage ended, and after how many seconds."""
    stage = STAGES[name]
    left_s = end_s - time.monotonic()
    limit_s = left_s if options.quick else min(stage.limit_s, left_s)
    if limit_s <= 0:
        return {"end": "no time left", "seconds": 0.0}
    command = [sys.executable, "-m", "bench", stage.bench, *(stage.quick if options.quick else stage.options).split()]
    command += ["--json", str((out / f"{name}.json").resolve())]
    if stage.bench != "device-tests":  # the tests look for a device by themselves
        command += ["--device", options.device]
    start_s = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        log.write((" ".join(command) + "\n").encode())
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit_s)
            end = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            end = "out of time"
        finally:
            _end(process)
    return {"end": end, "seconds": time.monotonic() - start_s}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Leave nothing running of a stage."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _show(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """What every stage printed of its figures, and how it ended."""
    for row in rows:
        log = out / f"{row['stage']}.log"
        if log.exists():
            print(f"\n== {row['stage']}\n" + "\n".join(log.read_text(errors="replace").splitlines()[1:][-40:]))
    table = Table("stage", "end", "s", box=None)
    for row in rows:
        table.add_row(row["stage"], row["end"], f"{row['seconds']:.0f}")
    wide_console(80).print(table)
