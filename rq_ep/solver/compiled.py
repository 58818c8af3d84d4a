"""Just-in-time compilation of loops that NumPy cannot express: numba or, where that is missing, plain Python.

Both give the same bits: sums are not reordered. Compiled functions must stay within what numba knows: NumPy arrays,
numbers, and (named) tuples of them.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, cached_property
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

numba: Any  # the compiler, None where it is missing
try:
    numba = import_module("numba")
    caching = import_module("numba.core.caching")
    Cache: Any = caching.FunctionCache
    NoCache: Any = caching.NullCache
except ImportError:
    numba, Cache, NoCache = None, object, object

log = logging.getLogger(__name__)

COMPILING_S = 120.0  # that a process waits for another one that compiles, which may have been stopped


class _MachineCodeCache(Cache):  # type: ignore[misc]
    """numba's cache on disk, with all that a function calls and reads in the key.

    numba compiles callees into their callers, but renews an entry only when the caller's own file changes: the entry
    would outlive a change of a callee or of a constant in another file.

    Of processes that miss an entry at once, such as the ranks of a server, one compiles and the others wait for it.
    """

    @cached_property
    def _turn(self) -> Any:
        """The lock of the process that compiles."""
        from filelock import FileLock  # here, as most processes compile nothing, and its import takes 0.07 s

        return FileLock(f"{self._cache_file._index_path}.lock", timeout=COMPILING_S)

    def load_overload(self, signature: Any, context: Any) -> Any:
        loaded = super().load_overload(signature, context)
        if loaded is None:
            with suppress(OSError):  # too late, or a folder without locks: it compiles, too
                self._turn.acquire()
            loaded = super().load_overload(signature, context)
            if loaded is None:
                _say_once("compiling loops: this can take half a minute, once for an installation")
            else:
                self._turn.release(force=True)
        return loaded

    def save_overload(self, *entry: Any) -> None:
        with suppress(OSError):  # a full disk or lost rights cost time in the next process, and nothing else
            super().save_overload(*entry)
        self._turn.release(force=True)

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        fields = tuple(getattr(argument, "fields", ()) for argument in signature)  # of named tuples
        return (*super()._index_key(signature, codegen), fields, digest(self._py_func))


class _NoFolder(NoCache):  # type: ignore[misc]
    """For a process that finds no folder to keep machine code in."""

    def load_overload(self, signature: Any, context: Any) -> None:
        _say_once(
            "compiling loops: this can take half a minute in every process, as neither the folder of the package nor "
            "the user's cache folder can be written; name another in NUMBA_CACHE_DIR"
        )


@cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile `function` on its first call, and keep the machine code beside the source for the next process.

    Where neither the package's folder nor the user's cache folder can be written, every process compiles anew.
    """
    return _compiled(function, nogil=False)


def compiled_part(function: Function) -> Function:
    """Compile `function` into its compiled callers, which keep it; called from Python it is Python.

    The compiler is spared what Python needs to call machine code.
    """
    if numba is None or numba.config.DISABLE_JIT:
        return function
    options = {"error_model": "numpy", "no_cfunc_wrapper": True}
    return cast("Function", numba.extending.register_jitable(**options)(function))


def compiled_beside(function: Function) -> Function:
    """As `compiled`, for what takes seconds: the process's other threads run meanwhile.

    Taking the interpreter back may wait for them, too long for what takes microseconds.
    """
    return _compiled(function, nogil=True)


def _compiled(function: Function, nogil: bool) -> Function:
    if numba is None or numba.config.DISABLE_JIT:
        return function
    dispatcher = numba.njit(error_model="numpy", nogil=nogil, no_cfunc_wrapper=True)(function)
    try:
        dispatcher._cache = _MachineCodeCache(function)
    except RuntimeError:
        dispatcher._cache = _NoFolder()
    return cast("Function", dispatcher)


def digest(function: Callable[..., object]) -> str:
    """A hash of the bytecode of `function` and its callees, and of the constants that they read from their modules."""
    hashed, pending = hashlib.sha256(), [cast("FunctionType", inspect.unwrap(function))]
    known = set(pending)
    for caller in pending:
        for code in _nested(caller.__code__):
            constants = [one for one in code.co_consts if not isinstance(one, CodeType)]
            hashed.update(repr((code.co_code, constants, code.co_names, code.co_varnames)).encode())
            for name in code.co_names:
                value = inspect.unwrap(caller.__globals__.get(name))  # type: ignore[arg-type]
                if isinstance(value, FunctionType) and value not in known:
                    known.add(value)
                    pending.append(value)
                elif isinstance(value, int | float | str | tuple):
                    hashed.update(repr((name, value)).encode())
    return hashed.hexdigest()


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the comprehensions and functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
