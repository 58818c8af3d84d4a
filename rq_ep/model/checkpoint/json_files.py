"""The JSON files of a model folder, which may come from a stranger: bounded before they are parsed."""

from pathlib import Path
from typing import Any

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import read_json
from rq_ep.model.checkpoint.lfs_pointers import check_is_no_pointer

MAX_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20  # an index of 90,000 tensors has 9 MB


def read_json_object(path: Path, hint: str = "restore it", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Args:
        path: the file.
        hint: what to do if there is no such file.
        max_bytes: the longest file that is read: a parsed one takes many times its size.

    Raises:
        UserError: there is no such file, it is too long, or it holds anything else.
    """
    check_is_no_pointer(path)
    document = read_json(path, "JSON", hint, max_bytes)
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected an object, found {type(document).__name__}")
    return document
