"""The console on which commands print their tables."""

from rich.console import Console

MIN_WIDTH = 100  # columns; a table cut to less could not be read


def wide_console(min_width: int = MIN_WIDTH) -> Console:
    """A console as wide as the terminal, and at least `min_width` columns."""
    console = Console(highlight=False)
    console.width = max(console.width, min_width)
    return console
