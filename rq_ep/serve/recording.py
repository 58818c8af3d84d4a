"""Recording what the router chooses while serving, on every rank in the same steps."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.moe.trace import RoutingRecorder
from rq_ep.parallel import EPGroup
from rq_ep.serve.link import Message
from rq_ep.sim.traces import RoutingTrace

log = logging.getLogger("rq_ep.serve")


class TraceRecording:
    """This rank's part of a recording. Odd marks start one, even marks end it; rank 0 writes the file.

    Args:
        model: what is served.
        group: its ranks; marks reach them between the same two steps.
        directory: where rank 0 writes traces; None: nowhere, and no mark comes.
        tell: takes the message that a recording has ended, on rank 0.
    """

    def __init__(
        self, model: nn.Module, group: EPGroup, directory: str | None, tell: Callable[[Message], None]
    ) -> None:
        self._model = model
        self._group = group
        self._directory = directory
        self._tell = tell
        self._recorder: RoutingRecorder | None = None

    def mark(self, number: int) -> None:
        """Start or end a recording; every rank calls this."""
        if number % 2:
            self._recorder = RoutingRecorder(self._model)
            self._recorder.__enter__()
        elif self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.__exit__(None, None, None)
            parts = self._group.all_gather_object(_trace(recorder))
            if self._group.rank == 0:
                self._tell({"kind": "recorded", **self._write(parts)})

    def _write(self, parts: list[RoutingTrace | None]) -> Message:
        traces = [part for part in parts if part is not None]
        if len(traces) < len(parts):
            return {"error": "no step was made while recording"}
        name = f"trace-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.safetensors"
        path = Path(self._directory or ".") / name
        try:
            trace = RoutingTrace.joined(traces)
            trace.save(path)
        except (OSError, UserError) as error:
            return {"error": f"{path}: {error}"}
        log.info("recorded %d steps of %d tokens to %s", len(trace.tokens_S), len(trace.ids_NLK), path)
        return {"path": str(path), "num_steps": len(trace.tokens_S), "num_tokens": len(trace.ids_NLK)}


def _trace(recorder: RoutingRecorder) -> RoutingTrace | None:
    try:
        return recorder.trace()
    except UserError:  # no step
        return None
