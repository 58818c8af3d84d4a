"""Where and of what a result was made."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "transformers", "deepspeed")


def facts(device: str) -> dict[str, Any]:
    """Commit, versions and hardware, as a result keeps them."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "cpu": _processor(),
            "num_cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
    }


def _commit() -> str | None:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        has_changes = git("status", "--porcelain", "--untracked-files=no", "../rq_ep", ".")
        return git("rev-parse", "HEAD") + ("+changes" if has_changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()
