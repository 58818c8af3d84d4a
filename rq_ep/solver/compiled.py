"""Loops that NumPy cannot take over: compiled by numba or, where that is missing, plain Python of equal results."""

from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, and keep the machine code beside the source for the next process.

    It must stay within what numba knows: NumPy arrays, numbers and tuples of them. Sums are not reordered, so that a
    compiled function and a plain one give the same bits. Kept code is renewed when its own file changes, not when a
    compiled function of another file does that it calls: delete `__pycache__` after changing one.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    return cast("Function", njit(cache=True, error_model="numpy")(function))
