"""The progress bar of the commands that keep one waiting. It goes to stderr, so results can be piped."""

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
