"""Renew the tables of bench/results/*.md."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Write the tables."""
    import argparse

    argparse.ArgumentParser(prog="python -m bench report").parse_args(argv)
