"""What several commands read from their command lines alike."""

from typing import TYPE_CHECKING

from rq_ep.core.errors import check_choice

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
          "fp16": "float16"}  # fmt: skip


def parse_names(text: str) -> list[str]:
    """`"bf16, int8"` -> ["bf16", "int8"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """A torch dtype from its name or its format's; None stays None."""
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[check_choice("--dtype", name, DTYPES)])
    return dtype


def quiet_libraries() -> None:
    """Keep transformers' progress bars out of ours. Only commands call this, since it holds for the whole process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
