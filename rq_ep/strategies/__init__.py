"""The strategies, one file each. Adding one is a file and a line in this table; `README.md` here has the recipe."""

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import isabstract
from typing import Any

from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.llep import Llep
from rq_ep.strategies.rq import ReplicateQuantize
from rq_ep.strategies.rq_llep import ReplicateLend
from rq_ep.strategies.rq_paper import PaperReplicateQuantize
from rq_ep.strategies.standard import Standard

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind for kind in (Standard, Eplb, Llep, ReplicateQuantize, PaperReplicateQuantize, ReplicateLend)
}


def names_where(trait: Callable[[type[Strategy]], bool]) -> tuple[str, ...]:
    """Names in the table, in its order, of the strategies that have a trait."""
    return tuple(name for name, kind in STRATEGIES.items() if trait(kind))


# Those that place in the native format alone, and so a model that was not calibrated.
NATIVE_STRATEGIES = names_where(lambda kind: not kind.needs_low_format)


def strategy_class(name: str) -> type[Strategy]:
    """The class that a name stands for: one of the table or, written `package.module:Class`, any that can be imported.

    Raises:
        UserError: there is none of this name, or what is there is no complete strategy.
    """
    if ":" not in name:
        return STRATEGIES[check_choice("strategy", name, STRATEGIES)]
    kind = _imported(name)
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise UserError(f"strategy {name!r}: is {kind!r:.80}, not a subclass of rq_ep.core.strategy.Strategy")
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise UserError(f"strategy {name!r}: does not define {missing}")
    if not is_dataclass(kind) or "__dataclass_fields__" not in vars(kind):
        raise UserError(f"strategy {name!r}: must be a dataclass, whose fields are its settings")
    if STRATEGIES.get(kind.name) is not kind and kind.name != f"{kind.__module__}:{kind.__qualname__}":
        raise UserError(
            f"strategy {name!r}: calls itself {kind.name!r}, by which placements would not find it again: "
            "leave out its `name`"
        )
    return kind


def make_strategy(name: str, /, **settings: Any) -> Strategy:
    """Build a strategy from its name (see `strategy_class`) and its settings; unknown ones are refused by name."""
    kind = strategy_class(name)
    known = setting_names(kind)
    for setting in settings:
        if not known:
            raise UserError(f"strategy {name!r} has no settings, so none is called {setting!r}")
        check_choice(f"setting of strategy {name!r}", setting, known)
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:  # a setting is missing or out of range
        raise UserError(f"strategy {name!r}: {error}") from error


def choose_strategy(strategy: str | Strategy | None, placement: Placement | None) -> Strategy:
    """The strategy that is named or given; by default the one that made the placement, or standard EP."""
    if strategy is None:
        strategy = "standard" if placement is None else placement.strategy
    return make_strategy(strategy) if isinstance(strategy, str) else strategy


def setting_names(kind: type[Strategy]) -> list[str]:
    """Names of a strategy's settings."""
    return [field.name for field in fields(kind)]  # type: ignore[arg-type]  # strategies are dataclasses


def _imported(name: str) -> object:
    """The object that `package.module:Class` names."""
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *class_name.split("."))):
        raise UserError(f"strategy {name!r}: expected package.module:Class")
    try:
        target: object = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"strategy {name!r}: importing {module_name} failed: {error}") from error
        raise UserError(
            f"strategy {name!r}: no module {error.name!r}: install it, or add its directory to PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(
            f"strategy {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for part in class_name.split("."):
        if not hasattr(target, part):
            where = getattr(sys.modules[module_name], "__file__", module_name)
            raise UserError(f"strategy {name!r}: no {class_name} in {where}")
        target = getattr(target, part)
    return target
