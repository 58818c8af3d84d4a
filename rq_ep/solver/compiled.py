"""Loops that NumPy cannot take over: compiled by numba or, where that is missing, plain Python of equal results."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])

try:
    from numba import njit
except ImportError:
    njit = None


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, and keep the machine code beside the source for the next process.

    It must stay within what numba knows: NumPy arrays, numbers and tuples of them. Sums are not reordered, so that a
    compiled function and a plain one give the same bits.
    """
    return function if njit is None else njit(cache=True, error_model="numpy")(function)
