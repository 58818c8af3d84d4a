"""What the command lines of the benches share: how help is laid out, and checks of values."""

import argparse

import torch

from rq_ep.core.errors import UserError, check_choice, check_integer


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not isinstance(action.default, list):
            says_nothing = action.default is None or action.default is False or action.default == ""
            return action.help if says_nothing else super()._get_help_string(action)
        shown = " ".join(map(str, action.default))
        return f"{action.help} (default: {shown})" if shown else action.help


def bench_parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a bench, which its module's docstring describes."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {bench}", description=description, formatter_class=HelpFormatter
    )


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise a `UserError` for the first of these options that is given and not at least 1; some have several values."""
    for name in names:
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                check_integer(f"--{name.replace('_', '-')}", value, 1)


def check_device(name: str) -> None:
    """Raise a `UserError` unless `name` is `cpu`, or `cuda` and there is a CUDA device."""
    check_choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
