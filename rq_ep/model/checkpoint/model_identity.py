"""Identity of a model: a hash of its checkpoint that is cheap at any size and changes when the model does."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from rq_ep.core.errors import UserError
from rq_ep.core.stats import UNKNOWN_HASH, ModelIdentity
from rq_ep.model.checkpoint.checkpoint_files import HEADERS_ONLY, read_config_json, weight_files

MAX_HEADER_BYTES = 100 << 20  # as safetensors itself
NUM_SAMPLES = 64  # per file, evenly spaced; a file of up to 256 KiB is read whole
SAMPLE_BYTES = 4096
IRRELEVANT = frozenset({"transformers_version", "_name_or_path"})  # differ with every saving


def model_identity(path: str | Path) -> ModelIdentity:
    """The identity of the checkpoint in directory `path`.

    It is the directory's name, or the model's on the hub, and a sha256 over the configuration and, for every weight
    file, the header (names, types, shapes, offsets) and samples of the bytes. Without these it is unknown.

    Raises:
        UserError: `path` is not a checkpoint directory, or one of its files is missing.
    """
    config = json.dumps(_relevant(read_config_json(path)), sort_keys=True)
    digest = sha256(config.encode())
    files = weight_files(path)
    if Path(path, HEADERS_ONLY).exists():
        return ModelIdentity(_model_id(Path(path).resolve()), UNKNOWN_HASH)
    for file in files:
        _add_file(digest, file)
    return ModelIdentity(_model_id(Path(path).resolve()), digest.hexdigest())


def _model_id(folder: Path) -> str:
    """The name of a folder; of a snapshot in the hub's cache, `models--ORG--NAME/snapshots/COMMIT`, ORG/NAME."""
    kind, *name = folder.parent.parent.name.split("--")
    return "/".join(name) if kind == "models" and folder.parent.name == "snapshots" else folder.name


def _relevant(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _relevant(value) for key, value in config.items() if key not in IRRELEVANT}
    return config


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")  # a safetensors file begins with its header's length
        if header_bytes > min(size, MAX_HEADER_BYTES):
            raise UserError(f"{path}: cut short or damaged (a header of {header_bytes:,} bytes in a file of {size:,})")
        file.seek(0)
        digest.update(file.read(header_bytes))
        last = size - SAMPLE_BYTES
        for i in range(NUM_SAMPLES):
            file.seek(max(header_bytes, last * i // (NUM_SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
