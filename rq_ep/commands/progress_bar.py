"""The progress bar of long commands. It goes to stderr, so that results can be piped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*columns: str) -> Progress:
    """A bar with the task's name, its share done and the time left; `columns` are further rich text templates."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def showing(is_shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A callback that takes (stage, done, total) and, if `is_shown`, updates a bar while the context is open."""
    if not is_shown:
        yield lambda stage, done, total: None
        return
    with progress_bar() as bar:
        task = bar.add_task("loading", total=1)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)
