"""What `--model` may name: a folder that holds a checkpoint, or ORG/NAME of the hub. Known without importing torch."""

import re
from pathlib import Path

from rq_ep.core.errors import UserError

HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # ORG/NAME; names without an organisation are aliases of such


def is_hub_name(model: str | Path) -> bool:
    """Whether a model is to be looked for on the hub: text of the form of its names, and nothing here is called so."""
    if isinstance(model, Path) or re.fullmatch(HUB_NAME, model) is None:
        return False
    return not (Path(model).exists() or Path(model).is_symlink())


def check_folder(path: str | Path) -> None:
    """Raise a `UserError` unless there is a folder with a `config.json`."""
    if not Path(path).is_dir():
        raise UserError(
            f"--model {path}: no such directory; expected a checkpoint with config.json and safetensors files, or "
            "ORG/NAME of the hub"
        )
    if not Path(path, "config.json").exists():
        raise UserError(f"--model {path}: no config.json; expected a Hugging Face checkpoint directory")


def check_is_there(model: str) -> None:
    """Raise a `UserError` for a name that is neither a checkpoint here, nor one of the hub or its cache."""
    if not (is_hub_name(model) or Path(model, "snapshots").is_dir()):
        check_folder(model)
