"""What is told of a server that has started: lines in the log, and the placement for whoever asks."""

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from rq_ep.core.placement import Placement
from rq_ep.parallel import EPGroup

log = logging.getLogger("rq_ep.serve")


def document(placement: Placement) -> dict[str, Any]:
    """A placement as its file holds it."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "placement.json"
        placement.save(path)
        content: dict[str, Any] = json.loads(path.read_text())
    return content


def report(
    model: PreTrainedModel, group: EPGroup, bytes_R: list[dict[str, int]], max_model_len: int, load_s: float
) -> None:
    """Say what was started."""
    log.info(
        "%d ranks on %s (%s), %d threads each, computing in %s; at most %d tokens a request; loaded in %.1f s",
        group.size, group.device.type, group.backend, torch.get_num_threads(), model.dtype, max_model_len, load_s,
    )  # fmt: skip
    for rank, by_format in enumerate(bytes_R):
        sizes = ", ".join(f"{size / 2**20:.2f} MiB {name}" for name, size in sorted(by_format.items()))
        log.info("rank %d: experts %s", rank, sizes or "none")
