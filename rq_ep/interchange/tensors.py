"""Files of arrays - `.npy`, `.npz`, `.safetensors`, `.pt` - from untrusted sources: sizes are checked first.

PyTorch is imported for `.pt` alone, and reads tensors and plain values only, never code.
"""

import io
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import MAX_INTEGER, UserError, check_choice
from rq_ep.core.files.documents import check_regular
from rq_ep.core.files.tensor_files import read_array

Array = npt.NDArray[Any]

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt")
BARE = ""  # the name of an array in a file that holds but one
MAX_CELLS = 2**28  # of one array: 2 GiB of counts, 17,000 steps of 61 layers of 256 experts
MAX_PT_BYTES = 2**33
MAX_TEXT_BYTES = 2**26  # 61 layers of 640 slots are 0.2 MB


def read_arrays(path: Path) -> dict[str, Array]:
    """Name -> array; a file that holds but one array, without a name, gives it the name `BARE`.

    Raises:
        UserError: the file is missing, damaged, foreign, hostile or absurdly large.
    """
    check_choice(f"file type of {path}:", path.suffix, SUFFIXES)
    if path.suffix == ".pt":
        document = load_pt(path)
        named = document if isinstance(document, Mapping) else {BARE: document}
        tensors = {name: value for name, value in named.items() if isinstance(name, str) and is_tensor(value)}
        return {name: tensor_array(path, name, value) for name, value in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_numpy(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # damaged headers make their parsers raise anything, tokenize.TokenError among it
        raise UserError(f"{path}: not a readable {path.suffix} file ({first_line(error)})") from None


def write_arrays(path: Path, suffix: str, arrays: Mapping[str, IntArray]) -> None:
    """Write named arrays into `path`, in the format that `suffix` names."""
    if suffix == ".npz":
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    elif suffix == ".safetensors":
        save_file(dict(arrays), path)
    else:
        import torch

        torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, path)


def load_pt(path: Path) -> Any:
    """What `torch.save` wrote, as long as it is tensors and plain values."""
    import torch

    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # as above
        raise UserError(f"{path}: not a file that torch.save wrote, or cut short ({first_line(error)})") from None
    size = sum(entry.file_size for entry in entries)
    if size > MAX_PT_BYTES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path}: unpacks to {size} bytes, more than torch.save or {MAX_PT_BYTES} bytes would explain")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make any of them
        raise UserError(
            f"{path}: holds more than tensors and plain values, or is damaged; it was not read ({first_line(error)})"
        ) from None


def is_tensor(value: Any) -> bool:
    """Whether a value of a `.pt` file is a tensor."""
    import torch

    return isinstance(value, torch.Tensor)


def tensor_array(source: Path, name: str, value: Any) -> Array:
    """A tensor of a `.pt` file as an array; its size is checked first, since strides can claim any."""
    import torch

    if not is_tensor(value) or value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{source}: {name or 'its content'} is no plain tensor")
    _check_size(source, name, tuple(value.shape))
    wide = torch.float64 if value.dtype.is_floating_point else value.dtype
    array: Array = value.detach().to(wide).numpy()
    return array


def whole_numbers(source: Path, name: str, array: Array, low: int = 0) -> IntArray:
    """`array` as int64.

    Raises:
        UserError: some are no whole numbers, or below `low`.
    """
    if array.dtype.kind not in "iuf":
        raise UserError(f"{source}: {name or 'its content'} is {array.dtype}, not numbers")
    wide = array.astype(np.float64) if array.dtype.kind == "f" else array
    wrong = array[~((wide >= low) & (wide <= MAX_INTEGER) & (wide == np.floor(wide)))]
    if wrong.size:
        raise UserError(f"{source}: {name or 'its content'} must be whole numbers from {low} up, but one is {wrong[0]}")
    return array.astype(np.int64)


def check_text_size(path: Path) -> None:
    """Raise a `UserError` if a file to be parsed is missing, or larger than any placement is as text."""
    try:
        size = check_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size > MAX_TEXT_BYTES:
        raise UserError(f"{path}: {size} bytes, more than {MAX_TEXT_BYTES}: no placement is that large")


def first_line(error: Exception) -> str:
    """An error as a part of a line."""
    text = str(error).strip().splitlines()
    return f"{text[0]:.100}" if text else type(error).__name__


def _read_safetensors(path: Path) -> dict[str, Array]:
    check_regular(path)
    path.open("rb").close()  # says why a file cannot be read; safetensors calls all of them missing
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        for name in names:
            _check_size(path, name, tuple(file.get_slice(name).get_shape()))
        return {name: read_array(file, path, name) for name in names}


def _read_numpy(path: Path) -> dict[str, Array]:
    check_regular(path)
    if path.suffix == ".npy":
        with path.open("rb") as file:
            _check_header(path, BARE, file)
        return {BARE: np.load(path, allow_pickle=False)}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                _check_header(path, entry.filename.removesuffix(".npy"), file)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_header(path: Path, name: str, file: Any) -> None:
    """Check the size that a `.npy` header claims, before NumPy makes room for it."""
    start = io.BytesIO(file.read(2**17))
    version = np.lib.format.read_magic(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(start)
    if dtype.hasobject:
        raise UserError(f"{path}: {name or 'its content'} holds Python objects; it was not read")
    _check_size(path, name, shape)


def _check_size(source: Path, name: str, shape: tuple[int, ...]) -> None:
    if prod(shape) > MAX_CELLS:
        raise UserError(
            f"{source}: {name or 'its content'} claims {' x '.join(map(str, shape))} numbers, more than {MAX_CELLS}: "
            "record fewer steps"
        )
