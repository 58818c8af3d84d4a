"""Files of ours and of users, JSON, YAML and safetensors: written atomically, read with errors of one line."""

import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rq_ep.core.errors import UserError

Document = TypeVar("Document")
AnyArray = npt.NDArray[Any]

MAX_JSON_BYTES = 256 << 20  # the placement of a large model has a few MB
MAX_YAML_BYTES = 1 << 20  # a file written by hand is far smaller, and reading YAML is slow
MAX_YAML_DEPTH = 50
MAX_NUMBER_LENGTH = 100  # characters of a number in YAML; Python takes seconds for millions of digits


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure it is removed.

    Raises:
        UserError: `path` cannot be written.
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files private; results are for sharing
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # the disk is full, say, or the folder was deleted
        raise UserError(f"{target}: cannot be written ({_reason(error)}); name another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def write_json(path: str | Path, document: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON document as `replacing` does; `default` gives a plain value for a type that JSON lacks."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, default=default) + "\n")


def check_writable(path: str | Path) -> None:
    """Raise a `UserError` if `replacing` could not write `path`: before long work, instead of after it."""
    _temporary_beside(Path(path)).unlink()


def _temporary_beside(target: Path) -> Path:
    if target.is_dir():
        raise UserError(f"{target}: is a directory; name a file to write")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({_reason(error)}); name another place") from None
    os.close(handle)
    return Path(name)


def read_json(path: str | Path, what: str, hint: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The JSON document in a file.

    Args:
        what: the file should be, such as "placement".
        hint: what to do if there is no such file.
        max_bytes: that it may have.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    text = read_text(path, what, hint, max_bytes)
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise UserError(f"{path}: not a readable {what} file (nested too deeply)") from None
    except ValueError as error:  # neither JSON, nor a number of decent length
        raise UserError(f"{path}: not a readable {what} file ({error})") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.60} is given twice")
    return mapping


def read_yaml(path: str | Path, what: str, hint: str) -> Any:
    """The YAML document in a file, as `parse_yaml` reads it; the arguments are those of `read_json`."""
    return parse_yaml(read_text(path, what, hint, MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """A plain YAML document: without references, in which a few lines can stand for more values than fit into memory.

    Args:
        where: the text is from, for messages.

    Raises:
        UserError: it is not YAML, it names a key twice, or it is nested too deeply.
    """
    try:
        return yaml.load(text, PlainYamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: malformed YAML ({problem:.200})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # a month 13; a text tagged as a number
        raise UserError(f"{where}: malformed YAML ({type(error).__name__}: {error!s:.100})") from None


class PlainYamlLoader(yaml.SafeLoader):
    """PyYAML's loader of plain values, without what makes a small text costly or ambiguous."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "references (& and *) are not read", event.start_mark)
        if self._depth == MAX_YAML_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [str(key.value) for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), "a key")
            raise yaml.constructor.ConstructorError(None, None, f"{twice:.60} is given twice", node.start_mark)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_NUMBER_LENGTH:  # left as text, for who asks for a number to refuse by name
            return node.value
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _kind in ("int", "float"):
    PlainYamlLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainYamlLoader.construct_number)


def read_text(path: str | Path, what: str, hint: str, max_bytes: int) -> str:
    """The text in a file.

    Args:
        path: the file.
        what: it should be, such as "placement".
        hint: what to do if there is no such file.
        max_bytes: that it may have.

    Raises:
        UserError: there is no such file, it is too long, or it is not UTF-8.
    """
    try:
        if (size := check_regular(path)) > max_bytes:
            raise UserError(f"{path}: not a {what} file: it has {size} bytes, and at most {max_bytes} are read")
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable {what} file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a readable {what} file ({error})") from None


def check_regular(path: str | Path) -> int:
    """Return the size of a file; raise an `OSError` if it is a pipe, a device or a directory, which may never end."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is a pipe or a device")
    return status.st_size


def read_document(path: str | Path, what: str, version: str, hint: str, read: Callable[[Any], Document]) -> Document:
    """The object that `read` builds from the JSON document in a file of ours.

    Args:
        path: the file.
        what: the file should be, such as "placement".
        version: what its "format" must be.
        hint: what to do if there is no such file.
        read: builds the object; errors of lookup, type or value that it raises become a `UserError`.

    Raises:
        UserError: the file is foreign, incomplete or cut short; the message names it.
    """
    document = read_json(path, what, hint)
    check_version(path, document.get("format") if isinstance(document, dict) else None, version)
    try:
        return read(document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        text = f"{type(error).__name__}: {error!s:.100}"
        raise UserError(f"{path}: incomplete {what} file ({text})") from None


def check_version(path: str | Path, version: object, expected: str) -> None:
    """Raise a `UserError` unless a file's "format" is the one expected."""
    if version != expected:
        raise UserError(f"{path}: format is {version!r:.60}, expected {expected!r}")


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
        hint: what to do if there is no such file, or another one.
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
        raise UserError(f"{path}: not a readable {what} ({error}); {hint}") from None


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
