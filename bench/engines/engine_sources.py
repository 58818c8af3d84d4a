"""Balancer modules of vLLM and SGLang, loaded from their unpacked wheels, without the rest of the engines.

    pip download --no-deps --dest wheels vllm==0.33.0 sglang==0.5.23
    for wheel in wheels/*.whl; do python -m zipfile -e $wheel engines; done
    export RQ_EP_ENGINES_DIR=engines

The modules named here are executed as they are in the wheel. Whatever else of the engine they import is a stand-in that
has every attribute: they need its names, not its work. Packages are entered without their `__init__`, which pulls in
the whole engine.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import MagicMock

from rq_ep.core.errors import UserError

VARIABLE = "RQ_EP_ENGINES_DIR"
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
VLLM_POLICY = "vllm.distributed.eplb.policy"
VLLM_STATE = "vllm.distributed.eplb.eplb_state"
SGLANG_ALGORITHMS = "sglang.srt.eplb.eplb_algorithms"
GENUINE = (  # modules, and packages with all that is in them, that are executed
    VLLM_POLICY,
    VLLM_STATE,
    "vllm.distributed.eplb.async_worker",
    "vllm.distributed.eplb.eplb_utils",
    "vllm.distributed.eplb.migration_scheduler",
    "vllm.distributed.eplb.rebalance_execute",
    "vllm.plugins",
    SGLANG_ALGORITHMS,
    "sglang.srt.eplb.eplb_manager",
    "sglang.srt.eplb.expert_distribution",
    "sglang.srt.eplb.expert_location",
    "sglang.srt.eplb.eplb_simulator",
    "sglang.srt.plugins",
)
KNOWN_VALUES = {"vllm.config.parallel": {"EPLBPolicyOption": Literal["default"]}}


def engines_folder(option: str | None = None) -> Path:
    """The folder that the wheels were unpacked into, from an option or the environment.

    Raises:
        UserError: it is not said, or holds other versions.
    """
    named = option or os.environ.get(VARIABLE)
    how = f"unpack the wheels of {' and '.join(f'{name} {version}' for name, version in VERSIONS.items())} there"
    if not named:
        raise UserError(f"--engines or {VARIABLE}: names no folder; {how}")
    folder = Path(named)
    for name, version in VERSIONS.items():
        if not _root(folder, name).joinpath(f"{name}-{version}.dist-info").is_dir():
            raise UserError(f"{folder}: has no {name} {version}; {how}")
    return folder


def _root(folder: Path, name: str) -> Path:
    """Where the package of an engine is: in the folder, or in one of the engine's own name."""
    return folder / name if (folder / name / name).is_dir() else folder


class _StandIn(ModuleType):
    """A module of an engine that has every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = KNOWN_VALUES.get(self.__name__, {}).get(name, MagicMock(name=f"{self.__name__}.{name}"))
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the engines: the genuine ones in their files, stand-ins for all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        engine = name.partition(".")[0]
        if engine not in VERSIONS:
            return None
        file = _root(self.folder, engine).joinpath(*name.split("."))
        if any(name == one or name.startswith(f"{one}.") for one in GENUINE):
            if file.is_dir():
                folders = [str(file)]
                return importlib.util.spec_from_file_location(
                    name, file / "__init__.py", submodule_search_locations=folders
                )
            return importlib.util.spec_from_file_location(name, file.with_suffix(".py"))
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has nothing to execute."""


@contextmanager
def engine_modules(folder: Path) -> Iterator[None]:
    """While it lasts, `import vllm...` and `import sglang...` find the modules in `folder`; then none is left."""
    finder = _Finder(folder)
    before = _loaded()
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in VERSIONS}
