"""Writing files so that a reader never sees half of one."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rq_ep.core.errors import UserError

Document = TypeVar("Document")


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
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, document: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON document as `replacing` does; `default` gives a plain value for one that JSON does not know."""
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
        raise UserError(f"{target}: cannot be written ({error.strerror}); name another place") from None
    os.close(handle)
    return Path(name)


def read_json(path: str | Path, what: str, hint: str) -> Any:
    """The JSON document in a file.

    Args:
        what: the file should be, such as "placement".
        hint: what to do if there is no such file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable {what} file ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: not a readable {what} file (nested too deeply)") from None
    except ValueError as error:  # neither JSON, nor UTF-8, nor a number of decent length
        raise UserError(f"{path}: not a readable {what} file ({error})") from None


def read_document(path: str | Path, what: str, version: str, hint: str, read: Callable[[Any], Document]) -> Document:
    """What `read` makes of the JSON document in a file of ours.

    Args:
        path: the file.
        what: it should be, such as "placement".
        version: what its "format" must say.
        hint: what to do if there is no such file.
        read: makes a noun of the document; it may trip over whatever is missing or wrong in it.

    Raises:
        UserError: the file is foreign, incomplete or cut short; the message names it.
    """
    document = read_json(path, what, hint)
    check_version(path, document.get("format") if isinstance(document, dict) else None, version)
    try:
        return read(document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: incomplete {what} file ({type(error).__name__}: {error})") from None


def check_version(path: str | Path, version: object, expected: str) -> None:
    """Raise a `UserError` unless a file's "format" is the one expected."""
    if version != expected:
        raise UserError(f"{path}: format is {version!r:.60}, expected {expected!r}")
