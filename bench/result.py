"""The result document of every bench: what was run, where, on which versions, and its rows, as one JSON file."""

import argparse
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rq_ep.commands.env import processor_name

PACKAGES = ("torch", "numpy", "transformers", "deepspeed")


def result_document(
    bench: str, argv: Sequence[str], options: argparse.Namespace, device: str = "cpu", /, **body: Any
) -> dict[str, Any]:
    """Assemble what `write_json` writes.

    Args:
        bench: its name.
        argv: the bench's arguments.
        options: the same, parsed and with their defaults.
        device: "cpu" or "cuda".
        body: the figures, as a rule `rows`.
    """
    return {
        "bench": bench,
        "command": shlex.join(["python", "-m", "bench", bench, *argv]),
        "options": {name: _plain(value) for name, value in vars(options).items()},
        **environment(device),
        **body,
    }


def environment(device: str) -> dict[str, Any]:
    """Commit, versions of packages, and hardware."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "cpu": processor_name(),
            "num_cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
    }


def _plain(value: Any) -> Any:
    """An option's value as JSON has it."""
    if is_dataclass(value):
        return asdict(value)  # type: ignore[arg-type]  # an instance
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


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
