"""What the plug-ins share: whether an engine calls as it did in the versions that were tested, and how a fault ends."""

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from rq_ep.core.errors import UserError, check_number
from rq_ep.plugins.slot_rebalance import SECONDS
from rq_ep.solver import compiled

NAME = "rq_ep"  # of the plug-in, wherever an engine takes a name
SECONDS_VARIABLE = "RQ_EP_EPLB_SECONDS"
MAX_SECONDS = 600.0

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class CallChecker:
    """Checks the functions of an engine's version against those that were tested."""

    def __init__(self, engine: str, tested: Sequence[str]) -> None:
        self.engine = engine
        self.tested = tuple(tested)
        try:
            self.version = version(engine)
        except PackageNotFoundError:  # it runs from a checkout
            self.version = "of unknown version"

    def check(self, function: Callable[..., Any], *parameters: str) -> None:
        """Raise if `function` has other parameters.

        Raises:
            UserError: it names the engine, its version, the function, and what was expected.
        """
        found = tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise UserError(
                f"{self.engine} {self.version} calls {function.__qualname__}({', '.join(found)}), not "
                f"({', '.join(parameters)}) as {self.engine} {' and '.join(self.tested)}, which were tested"
            )

    def untested(self) -> str:
        """A remark for the log, where another version has the same calls; empty for a tested one."""
        if self.version in self.tested:
            return ""
        return f" ({self.engine} {self.version} calls as {' and '.join(self.tested)} did, but was not tested)"


class Fallback:
    """Runs ours and, where it fails, returns the engine's own answer; the first failure is logged."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.failed = False

    def __call__(self, ours: Callable[[], Result], own: Result) -> Result:
        """What `ours` returns, or `own` if it raises.

        What the arguments cause happens on all ranks alike. A rank that alone runs out of memory must not place
        otherwise than the others do: it fails, as it would anywhere else.
        """
        try:
            return ours()
        except MemoryError:
            raise
        except Exception as error:
            if not self.failed:
                logger.warning(
                    "rq_ep: %s places as without rq_ep, now and whenever this happens again: %s",
                    self.engine, error, exc_info=not isinstance(error, UserError),
                )  # fmt: skip
            self.failed = True
            return own


def check_compiler() -> None:
    """Raise where the search would run uncompiled, a thousand times as slow.

    Raises:
        UserError: numba is missing or told not to compile.
    """
    if compiled.numba is None or compiled.numba.config.DISABLE_JIT:
        raise UserError("numba is missing or does not compile here: pip install numba, without NUMBA_DISABLE_JIT")


def seconds_allowed() -> float:
    """How long a placement may take, from the environment; it must be the same on all ranks.

    Raises:
        UserError: the variable is no number of seconds.
    """
    text = os.environ.get(SECONDS_VARIABLE, "").strip()
    if not text:
        return SECONDS
    try:
        return check_number(SECONDS_VARIABLE, float(text), 0, MAX_SECONDS)
    except ValueError:
        raise UserError(f"{SECONDS_VARIABLE} {text:.20}: must be a number from 0 to {MAX_SECONDS:g}") from None
