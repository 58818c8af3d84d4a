"""Text and JSON files: written atomically, read within bounds, with errors of one line."""

import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from rq_ep.core.errors import UserError

Document = TypeVar("Document")

MAX_JSON_BYTES = 256 << 20  # the placement of a large model has a few MB


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure it is removed.

    It is on the disk before it is renamed: after a loss of power there is the old file or the new one, and whole.

    Raises:
        UserError: `path` cannot be written.
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files private; results are for sharing
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
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
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a readable {what} file (it is not UTF-8 text)") from None


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
    with complete_file(path, what):
        try:
            return read(document)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


@contextmanager
def complete_file(path: str | Path, what: str) -> Iterator[None]:
    """While open, an error of lookup, type or value becomes a `UserError` that calls the file incomplete."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        text = f"{type(error).__name__}: {error!s:.100}"
        raise UserError(f"{path}: incomplete {what} file ({text})") from None


def check_version(path: str | Path, version: object, expected: str) -> None:
    """Raise a `UserError` unless a file's "format" is the one expected."""
    if version != expected:
        raise UserError(f"{path}: format is {version!r:.60}, expected {expected!r}")
