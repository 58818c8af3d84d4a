"""The strategies, one file each. Adding one is a file and a line in this table."""

from dataclasses import fields
from typing import Any

from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.strategy import Strategy
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.llep import Llep
from rq_ep.strategies.rq import ReplicateQuantize
from rq_ep.strategies.rq_llep import ReplicateLend
from rq_ep.strategies.rq_paper import PaperReplicateQuantize
from rq_ep.strategies.standard import Standard

STRATEGIES: dict[str, type[Strategy]] = {
    "standard": Standard,
    "eplb": Eplb,
    "llep": Llep,
    "rq": ReplicateQuantize,
    "rq_paper": PaperReplicateQuantize,
    "rq_llep": ReplicateLend,
}
# Those that place in the native format alone, and so a model that nobody has calibrated.
NATIVE_STRATEGIES = tuple(name for name in STRATEGIES if name != PaperReplicateQuantize.name)


def make_strategy(name: str, /, **knobs: Any) -> Strategy:
    """Build a strategy from its name and its knobs; unknown ones are refused by name."""
    kind = STRATEGIES[check_choice("strategy", name, STRATEGIES)]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # strategies are dataclasses
    for knob in knobs:
        if not known:
            raise UserError(f"strategy {name!r} has no settings, so none is called {knob!r}")
        check_choice(f"setting of strategy {name!r}", knob, known)
    try:
        return kind(**knobs)
    except UserError as error:
        raise UserError(f"strategy {name!r}: {error}") from None
