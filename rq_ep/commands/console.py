"""Where the commands print their tables."""

from rich.console import Console

MIN_WIDTH = 100  # columns; a table cut to less could not be read


def wide_console() -> Console:
    """A console as wide as the terminal, or wide enough for our tables where output goes elsewhere."""
    console = Console(highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    return console
