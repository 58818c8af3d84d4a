"""Settings and files as nobody should write them: each is taken with a sane meaning, or refused in one line by name."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rq_ep.commands.calibrate import CalibrateOptions
from rq_ep.commands.convert import ConvertOptions
from rq_ep.commands.eval import EvalOptions
from rq_ep.commands.place import PlaceOptions
from rq_ep.commands.profile import ProfileOptions
from rq_ep.commands.quantize import QuantizeOptions
from rq_ep.commands.simulate import SimulateOptions
from rq_ep.config import ServeConfig, add_flags, read_settings, read_settings_file
from rq_ep.core.errors import UserError
from rq_ep.core.options import options_of
from rq_ep.core.placement import Placement
from rq_ep.core.rules import Rules
from rq_ep.core.stats import ExpertStats
from rq_ep.costs import cost_model
from rq_ep.sim.traces import RoutingTrace, is_trace

SETTINGS = [
    ServeConfig, CalibrateOptions, ConvertOptions, EvalOptions, PlaceOptions, ProfileOptions, QuantizeOptions,
    SimulateOptions,
]  # fmt: skip
VALUES = [
    ".nan", ".inf", "-.inf", "-1", "0", "1.0e+400", "1e400", "x", '""', "[]", "{}", "null", "true", "[[1]]", '"a\\nb"',
    '"a\\0b"', "1" * 400, "0x" + "f" * 5000, "2020-01-01", "!!binary aGk=",
]  # fmt: skip
TEXTS = ["nan", "inf", "-inf", "-1", "0", "1e400", "x", "", "[]", "{", "1" * 400, "x" * 5000, "a\nb"]
MAX_MESSAGE = 600


def reader(settings: type[Any]) -> Callable[..., Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, settings)
    return lambda *argv: read_settings(settings, parser.parse_args(argv))


def read(settings: type[Any], *argv: str) -> Any:
    return reader(settings)(*argv)


def fault_of(name: str, read: Callable[..., Any], *arguments: str) -> str | None:
    """What is wrong with the way in which something is refused; None if it is taken, or refused well: by name."""
    try:
        read(*arguments)
    except UserError as error:
        text = str(error)
        is_good = "\n" not in text and len(text) < MAX_MESSAGE and name in text
        return None if is_good else text[:MAX_MESSAGE]
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.100}"
    return None


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_odd_value_of_every_setting_is_taken_or_refused_by_name(settings: type[Any], tmp_path: Path) -> None:
    options = options_of(settings)
    needed = {item.key: "1" if item.kind is int else "x" for item in options.values() if item.required}
    file, faults, read = tmp_path / "settings.yaml", {}, reader(settings)
    for item in options.values():
        for value in VALUES:
            file.write_text("".join(f"{key}: {text}\n" for key, text in {**needed, item.key: value}.items()))
            if fault := fault_of(item.flag, read, "--config", str(file)):
                faults[f"{item.key}: {value:.20}"] = fault
        if item.kind is bool:
            continue
        for text in TEXTS:
            flags = [f"--{key}={given}" for key, given in needed.items() if key != item.key]
            if fault := fault_of(item.flag, read, *flags, f"{item.flag}={text}"):
                faults[f"{item.flag}={text:.20}"] = fault
    assert not faults


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_number_of_the_settings_is_finite_and_in_a_range_that_is_declared(settings: type[Any]) -> None:
    for item in options_of(settings).values():
        if item.kind is float:
            assert item.minimum is not None, f"{item.flag}: declare its least value"
            for value in (math.nan, math.inf, -math.inf, 10**400):
                with pytest.raises(UserError, match=item.flag):
                    item.check([value] if item.is_sequence else value)


@pytest.mark.parametrize("flag", ["--stall-timeout", "--rank-timeout", "--shutdown-timeout", "--http-timeout"])
def test_no_timeout_can_be_turned_off_by_a_number_that_is_none(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for value in (".nan", ".inf", "1.0e+300"):
        file.write_text(f"model: m\n{flag[2:]}: {value}\n")
        with pytest.raises(UserError, match=f"{file}: {flag} .*must be"):
            read(ServeConfig, "--config", str(file))
    for value in ("nan", "inf", "1e300"):
        with pytest.raises(UserError, match=f"^{flag} .*must be"):
            read(ServeConfig, "--model", "m", flag, value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 1: malformed YAML .references"),
        ("strategy: " + "[" * 5000, "nested too deeply"),
        ("model: a\nmodel: b\n", "model is given twice"),
        ("model: m\nseed: " + "1" * 100_000, "--seed '1{59}.*must be a whole number"),
        ("model: m\nseed: 1" + ":59" * 100_000, "--seed '1:59:.*must be a whole number"),
        ("model: 2020-13-45", "malformed YAML .ValueError: month"),
        ("seed: !!int x", "malformed YAML .ValueError"),
        ("seed: !!timestamp x", "malformed YAML .AttributeError"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable key"),
        ("model: \x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_costly_or_ambiguous_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    started_s = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        read(ServeConfig, "--config", str(file))
    assert str(file) in str(caught.value)
    assert time.monotonic() - started_s < 5


READERS: dict[str, Callable[[str], Any]] = {
    "settings.yaml": read_settings_file,
    "machine.yaml": cost_model,
    "profile.json": cost_model,
    "rules.yaml": Rules.load,
    "placement.json": Placement.load,
    "stats.safetensors": ExpertStats.load,
    "trace.safetensors": RoutingTrace.load,
}


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        make_sparse,
        lambda path: path.write_bytes(b"\xff\xfe\x00" * 1000),
        lambda path: path.write_text("[" * 300_000),
        lambda path: path.write_text('{"format": ' + "[" * 900 + "]" * 900 + "}"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
    ],
    ids=["a directory", "a pipe", "10 GiB", "not UTF-8", "deep", "900 deep", "a device", "a link to itself"],
)
def test_files_that_are_none_are_refused_at_once(tmp_path: Path, name: str, make: Callable[[Path], Any]) -> None:
    path = tmp_path / name
    make(path)
    started_s = time.monotonic()
    assert fault_of(str(path), READERS[name], str(path)) is None
    if name.startswith("trace"):
        assert not is_trace(path)
    assert time.monotonic() - started_s < 5


def test_a_key_that_a_json_file_gives_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"format": "rq_ep.placement/1"})[:-1] + ', "format": 3}')
    with pytest.raises(UserError, match=r"placement.json: not a readable placement file .'format' is given twice"):
        Placement.load(path)
