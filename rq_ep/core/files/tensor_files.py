"""Safetensors files of ours: arrays and metadata, written atomically, read with errors of one line."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_regular, check_version, replacing

AnyArray = npt.NDArray[Any]


class TensorFile(NamedTuple):
    """The content of a safetensors file of ours: arrays by name, and metadata whose values are JSON or plain text."""

    arrays: dict[str, AnyArray]
    metadata: dict[str, Any]


def write_tensors(path: str | Path, version: str, arrays: Mapping[str, AnyArray], metadata: Mapping[str, Any]) -> None:
    """Write arrays and metadata; `version` becomes the metadata's "format"."""
    texts = {key: json.dumps(value) for key, value in {"format": version, **metadata}.items()}
    with replacing(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, texts)


def read_tensors(path: str | Path, what: str, version: str, hint: str, names: Collection[str]) -> TensorFile:
    """Read the arrays that are among `names`, each in the dtype of the file, and all metadata.

    Args:
        path: the file.
        what: the file should be, such as "trace".
        version: what its "format" must be.
        hint: what to do if there is no such file.
        names: arrays to read.

    Raises:
        UserError: the file is missing, damaged or foreign.
    """
    try:
        check_regular(path)
        Path(path).open("rb").close()  # says why a file cannot be read; safetensors calls all of them missing
        with safe_open(path, framework="numpy") as file:
            metadata = {key: parse_metadata(text) for key, text in (file.metadata() or {}).items()}
            check_version(path, metadata.get("format"), version)
            arrays = {name: read_array(file, path, name) for name in file.keys() if name in names}  # noqa: SIM118
            return TensorFile(arrays, metadata)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except (SafetensorError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{path}: not a readable {what} file ({reason})") from None


def parse_metadata(text: str) -> Any:
    """A value of the metadata: JSON or, where it is none, the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_array(file: Any, path: str | Path, name: str) -> AnyArray:
    """An array of an open safetensors file; bfloat16, which NumPy lacks, as float32.

    Raises:
        UserError: NumPy has no type for it.
    """
    part = file.get_slice(name)
    if part.get_dtype() == "BF16":
        return _read_bfloat16(path, name).reshape(part.get_shape())
    try:
        array: AnyArray = file.get_tensor(name)
    except (TypeError, AttributeError):  # how safetensors says that it did not find the type in NumPy
        raise UserError(f"{path}: {name} is {part.get_dtype()}, not plain integers or floats") from None
    return array


def _read_bfloat16(path: str | Path, name: str) -> AnyArray:
    with Path(path).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(header_bytes))[name]["data_offsets"]
        file.seek(8 + header_bytes + begin)
        upper_halves = np.frombuffer(file.read(end - begin), "<u2")
    return (upper_halves.astype(np.uint32) << 16).view(np.float32)


def as_dtype(name: str, array: AnyArray, dtype: npt.DTypeLike) -> AnyArray:
    """Convert an array of any integer or float type to `dtype`.

    Raises:
        UserError: `dtype` is of integers and a value is no whole number or too large, or the array holds no numbers.
    """
    target = np.dtype(dtype)
    if array.dtype.kind not in "iuf":
        raise UserError(f"{name} is {array.dtype}, not numbers")
    if target.kind == "f":
        return array.astype(target, copy=False)
    limits = np.iinfo(target)
    if array.dtype.kind == "f":
        wide = array.astype(np.float64)
        # Below the next integer after the largest, which is a power of 2 and so a float exactly; the largest is not.
        fits = (wide >= limits.min) & (wide < float(limits.max + 1)) & (np.floor(wide) == wide)
    else:
        fits = (array >= max(limits.min, np.iinfo(array.dtype).min)) & (
            array <= min(limits.max, np.iinfo(array.dtype).max)
        )
    if not fits.all():
        raise UserError(f"{name} must be whole numbers that {target} holds, but one is {array[~fits][0]}")
    return array.astype(target, copy=False)
