"""A checkpoint whose experts take more bytes and compute the same: their matrices are padded with zeros.

The demo's experts are so small (48 KiB) that moving many of them takes no time. Widened, they route the same tokens to
the same experts, so that loads, placements and answers stay what they are.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from rq_ep.core.errors import UserError


def widen(model: str | Path, out: Path, intermediate_size: int) -> None:
    """Write a checkpoint of one file whose experts have this intermediate size.

    Args:
        model: checkpoint with experts as transformers stores most of them: `gate_proj`, `up_proj` and `down_proj`.
        out: directory that does not exist yet.
        intermediate_size: at least the model's own.

    Raises:
        UserError: the experts are stored in another way, or are wider already.
    """
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "text"))
    config = json.loads((out / "config.json").read_text())
    width = config.get("moe_intermediate_size")
    if width is None or width > intermediate_size:
        raise UserError(f"{model}: experts of width {width} cannot be padded to {intermediate_size}")
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            tensors |= {name: _padded(name, file.get_tensor(name), intermediate_size - width) for name in names}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": intermediate_size}, indent=1))


def _padded(name: str, tensor: Tensor, more: int) -> Tensor:
    if ".experts." not in name:
        return tensor
    amounts = {"gate_proj": (0, 0, 0, more), "up_proj": (0, 0, 0, more), "down_proj": (0, more)}
    projection = name.split(".")[-2]
    if projection not in amounts or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"{name}: only experts of three matrices that are not quantized can be widened")
    return pad(tensor, amounts[projection])
