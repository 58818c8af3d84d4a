"""Options of everything that takes a model."""

from dataclasses import dataclass

from rq_ep.core.options import option

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
MODEL_HELP = (
    "directory of a Hugging Face checkpoint, or ORG/NAME of the hub, which is downloaded into its cache (HF_HOME, "
    "HF_TOKEN, HF_HUB_OFFLINE)"
)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How a model's files are had and read, wherever a model is named."""

    revision: str | None = option(
        None,
        help="branch, tag or commit of a model of the hub; default: main",
        metavar="REV",
    )
    strict_weights: bool = option(
        False,
        help="refuse a model with tensors that it does not know, such as those of multi-token prediction, instead of "
        "leaving them unread with a warning",
    )
