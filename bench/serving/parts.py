"""A bench of several parts, of which some may be run: each keeps the others of an earlier result."""

import argparse
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.options import check_positive
from bench.result import result_document
from rq_ep.core.errors import check_choice
from rq_ep.core.files.documents import check_writable, read_json, write_json


def read_options(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    parts: Collection[str],
    positive: Collection[str],
    quick: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a bench of several parts, and the parts that are asked for.

    Args:
        parser: of its options, of which `parts` names parts by commas.
        argv: its arguments.
        parts: the names of all.
        positive: options that have to be 1 or more.
        quick: the values of options with `--quick`.

    Raises:
        UserError: an option makes no sense, or a result cannot be written where it is to go.
    """
    options = parser.parse_args(argv)
    if quick and options.quick:
        vars(options).update(quick)
    asked = [check_choice("part", name, parts) for name in options.parts.split(",")]
    check_positive(options, *positive)
    for path in filter(None, (options.json, getattr(options, "png", None))):
        check_writable(path)
    return options, asked


def run_parts(
    bench: str,
    argv: Sequence[str],
    options: argparse.Namespace,
    asked: Collection[str],
    parts: Mapping[str, Callable[[], dict[str, Any]]],
) -> dict[str, Any]:
    """Run the parts that are asked for, and write the result after each. Returns it.

    Args:
        bench: its name.
        argv: its arguments.
        options: the same, parsed; `json` is where the result goes, with the other parts of a file that is there.
        asked: names of parts.
        parts: all of them, by name.
    """
    found: dict[str, Any] = {}
    if options.json and len(asked) < len(parts) and Path(options.json).exists():
        found = read_json(options.json, "result", "leave --json out")["parts"]
    result: dict[str, Any] = {}
    for name in asked:
        started_s = time.monotonic()
        found[name] = parts[name]()
        found[name] |= {"seconds": time.monotonic() - started_s, "load_average": os.getloadavg()[0]}
        result = result_document(bench, argv, options, parts=found)
        if options.json:
            write_json(options.json, result)
    return result
