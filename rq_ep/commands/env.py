"""`rq-ep env`: hardware and versions, for bug reports and benchmarks."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("rq_ep", "torch", "transformers", "safetensors", "numpy", "scipy", "deepspeed", "ray")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title="rq-ep env")
    for name, value in facts.items():
        lines = [f"{key} {entry}" for key, entry in value.items()] if isinstance(value, dict) else [str(value)]
        table.add_row(name, "\n".join(lines))
    Console().print(table)


def environment() -> dict[str, Any]:
    """Hardware and versions as plain values; benchmarks store the same with their results."""
    import torch

    devices = {
        f"cuda:{i}": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
        if (properties := torch.cuda.get_device_properties(i))
    }
    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{processor_name()}, {len(os.sched_getaffinity(0))} cores usable",
        "torch threads": torch.get_num_threads(),
        "devices": devices or "no CUDA device: everything runs on the CPU",
        "collectives": ", ".join(backends),
        "backend of torchrun": "nccl" if devices and "nccl" in backends else "gloo",
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The CPU in words."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
