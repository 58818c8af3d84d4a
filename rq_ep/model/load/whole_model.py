"""A model with all of its experts, in this process and without expert parallelism."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rq_ep.model.load.opened_model import OpenedModel


def load_whole_model(
    path: str | Path, dtype: torch.dtype | str, device: torch.device, *, strict_weights: bool = False
) -> PreTrainedModel:
    """Load the whole model in this process, from the same tensors that ranks read, in the form of transformers.

    Low-bit weights are dequantized. The MoE layers are in the form that `rq_ep.model.seam` knows.

    Args:
        path: checkpoint directory.
        dtype: to compute in; "auto": as the weights are stored.
        device: where the weights go.
        strict_weights: as in `load`.

    Raises:
        UserError: the checkpoint cannot be served, or its weights are not those of its configuration.
    """
    opened = OpenedModel.open(path, dtype, whole=True, strict_weights=strict_weights)
    opened.log_notes()
    opened.fill(device)
    model: Any = opened.model
    whole_model: PreTrainedModel = model.to(device).eval()
    return whole_model
