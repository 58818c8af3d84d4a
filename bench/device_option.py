"""The option `--device` of a bench."""

import torch

from rq_ep.core.errors import UserError, check_choice


def check_device(name: str) -> None:
    """Raise a `UserError` unless `name` is `cpu`, or `cuda` and there is a CUDA device."""
    check_choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
