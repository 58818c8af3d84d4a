"""The Slurm script, with stand-ins for Slurm's commands and real signals."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.serve.running import ROOT, until

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" > "$STUB/arguments"
trap 'sleep 0.5; touch "$STUB/drained"; exit 3' TERM
touch "$STUB/started"
while :; do sleep 0.05; done
"""


@pytest.mark.dist
def test_the_slurm_script_waits_for_the_drain_and_ends_with_its_status(tmp_path: Path) -> None:
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho node7\necho node8\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "5"}
    environment = os.environ | job | {"STUB": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "launch/slurm.sbatch", "--model", "a model"]
    script = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        until((tmp_path / "started").exists, 20)
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 3
        assert (tmp_path / "drained").exists()
        arguments = (tmp_path / "arguments").read_text()
        assert "--nnodes 2 --nproc-per-node 8 " in arguments
        assert "--rdzv-endpoint node7:29500" in arguments
        assert arguments.endswith("-m rq_ep.serve --host 0.0.0.0 --model a model\n")
    finally:
        script.kill()
