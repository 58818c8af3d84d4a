"""Copies of memory and bytes over connections, one after another, outside of the interpreter."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.solver.compiled import compiled_beside, numba

COPY, SAY, HEAR = range(3)

_BYTE = np.zeros(1, np.uint8)  # that is said, and heard
_BYTE_ADDRESS: int = _BYTE.ctypes.data


class Operation(NamedTuple):
    """What one of the C library's functions is to do: `memcpy`, `write` or `read`."""

    kind: int
    target: int  # address or descriptor
    address: int
    nbytes: int


def copy(target: int, source: int, nbytes: int) -> Operation:
    """Copy memory from one address to another."""
    return Operation(COPY, target, source, nbytes)


def say(connection: int) -> Operation:
    """Write a byte to a descriptor."""
    return Operation(SAY, connection, _BYTE_ADDRESS, 1)


def hear(connection: int) -> Operation:
    """Wait for a byte of a descriptor."""
    return Operation(HEAR, connection, _BYTE_ADDRESS, 1)


def undone_of(operations: Sequence[Operation]) -> tuple[int, str]:
    """Carry the operations out; the number of the first that could not be, and why. All, and no reason, at best."""
    table = np.array(operations, np.int64).reshape(-1, len(Operation._fields))
    done = 0
    while (done := carried_out(table, done)) < len(operations):
        try:
            _again(operations[done])  # a signal may have interrupted it; else this says what is wrong
        except OSError as error:
            return done, str(error)
        done += 1
    return done, ""


def _again(operation: Operation) -> None:
    if operation.kind == SAY:
        os.write(operation.target, b"\0")
    elif not os.read(operation.target, 1):
        raise ConnectionError("its connection has ended")


def _of_c_library(name: str) -> Any:
    """A function of three integers, for compiled code or, where there is no compiler, for Python."""
    if numba is not None and not numba.config.DISABLE_JIT:
        return numba.types.ExternalFunction(name, numba.int64(numba.int64, numba.int64, numba.int64))
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_ssize_t] * 3, ctypes.c_ssize_t
    return function


_memcpy, _write, _read = map(_of_c_library, ("memcpy", "write", "read"))


@compiled_beside
def carried_out(table_N4: IntArray, first: int) -> int:
    """Carry out the operations from the first on; the number of the one that has failed, or of all."""
    for number in range(first, len(table_N4)):
        kind, target, address, nbytes = table_N4[number]
        if kind == COPY:
            _memcpy(target, address, nbytes)
        elif kind == SAY:
            if _write(target, address, nbytes) != nbytes:
                return number
        elif _read(target, address, nbytes) != nbytes:
            return number
    return len(table_N4)
