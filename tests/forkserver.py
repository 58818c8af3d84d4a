"""Processes that begin with torch and transformers imported: one server imports them, and is forked for each."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Any

from torch.multiprocessing import start_processes

PRELOADED = ["rq_ep.engine.engine", "rq_ep.model.load.load_model", "tests.moe.cases"]


def forkserver() -> ForkServerContext:
    """The server of this process: it is started with the first process that is asked of it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_forked(work: Callable[..., None], args: tuple[Any, ...], num_processes: int) -> None:
    """Call `work(number, *args)` in as many processes; raises what ends one of them."""
    start_processes(work, args, num_processes, start_method=forkserver().get_start_method())
