"""Git LFS pointers: the short texts that a clone without git-lfs holds in the place of large files."""

from contextlib import suppress
from pathlib import Path

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_regular

START = b"version https://git-lfs.github.com/spec/"
MAX_BYTES = 1023  # of a pointer, by git-lfs's specification


def check_is_no_pointer(path: Path) -> None:
    """Raise a `UserError` if a file is a pointer; one that cannot be read is left to its reader."""
    with suppress(OSError):
        if len(START) < check_regular(path) <= MAX_BYTES and path.read_bytes().startswith(START):
            raise UserError(
                f"{path}: is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, which needs "
                "git-lfs"
            )
