"""Options declared once: their checks, and the signature and docstring of a function that takes them."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

import rq_ep
from rq_ep.core.errors import UserError
from rq_ep.core.options import check_options, option, options_of, same_option, selected, takes_options


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = option(0, help="seed", minimum=0)
    share: float | None = option(None, help="a share", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    name: str = option("", help="a name", required=True)
    mode: Literal["fast", "slow"] = option("fast", help="a mode")
    sizes: Sequence[int] = option((), help="sizes", minimum=1)
    path: Path | str | None = option(None, help="a path")
    verbose: bool = option(False, help="say more")
    limit_s: float = option(1.0, help="seconds", flag="--limit", minimum=0)
    note: str = "not an option"

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": "a", "seed": 3, "share": 1, "mode": "slow", "sizes": [1, 2], "path": Path("x"), "verbose": True},
        {"path": "x", "share": None, "limit_s": 0},
    ],
)
def test_values_in_range_are_taken(given: dict[str, Any]) -> None:
    Derived(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"seed": 1.5}, "--seed 1.5: must be a whole number"),
        ({"seed": None}, "--seed None: must be a whole number"),
        ({"share": 1.5}, "--share 1.5: must be at most 1"),
        ({"mode": "fats"}, "unknown --mode 'fats': did you mean 'fast'"),
        ({"sizes": [1, 0]}, "--sizes 0: must be at least 1"),
        ({"sizes": 3}, "--sizes 3: must be a list"),
        ({"sizes": "3"}, "--sizes '3': must be a list"),
        ({"verbose": 1}, "--verbose 1: must be true or false"),
        ({"limit_s": -1}, "--limit -1: must be at least 0"),
        ({"name": 3}, "--name 3: must be text"),
    ],
)
def test_values_out_of_range_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Derived(**given)


def test_an_option_knows_its_flag_its_key_and_where_it_is_declared() -> None:
    options = options_of(Derived)
    assert "note" not in options
    assert (options["limit_s"].flag, options["limit_s"].key) == ("--limit", "limit")
    assert (options["seed"].depth, options["mode"].depth) == (1, 0)
    assert options["mode"].choices == ("fast", "slow")


def test_an_option_of_another_class_can_be_declared_again() -> None:
    @dataclass(frozen=True)
    class Other:
        share: float = same_option(Base, "share", default=0.5, help="another share")

    with pytest.raises(UserError, match="--share 2: must be at most 1"):
        check_options(Other(2))
    assert (Other().share, options_of(Other)["share"].help) == (0.5, "another share")


def test_the_options_of_a_base_are_selected() -> None:
    assert selected(Base, Derived(seed=4, name="a")) == {"seed": 4, "share": None}


def test_a_function_shows_the_options_that_it_passes_on() -> None:
    @takes_options(Derived)
    def run(seed: int, settings: Derived | None = None, **options: Any) -> Derived:
        """Run."""
        return replace(settings or Derived(), seed=seed, **options)

    shown = [name for name in options_of(Derived) if name != "seed"]
    assert list(inspect.signature(run).parameters) == ["seed", "settings", *shown]
    assert "mode: a mode" in (run.__doc__ or "")
    assert run(3, mode="slow") == Derived(seed=3, mode="slow")


def test_place_shows_its_options() -> None:
    parameters = inspect.signature(rq_ep.place).parameters
    assert parameters["max_low_precision_share"].default == 0.25
    assert "max_error: cap on the experts' relative output errors" in (rq_ep.place.__doc__ or "")
