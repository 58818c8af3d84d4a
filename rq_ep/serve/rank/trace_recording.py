"""Recording of the router's choices while serving, on every rank in the same steps."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES, ModelIdentity
from rq_ep.engine.requests import Batch
from rq_ep.moe import RoutingRecorder, StepInfo
from rq_ep.parallel import EPGroup
from rq_ep.serve.messages import Recorded, RecordingFailed
from rq_ep.sim.traces import RoutingTrace

log = logging.getLogger("rq_ep.serve")

NOTHING = "no step was made while recording, or the first had more tokens than --record-max-tokens allows a rank"

CHANGED = "a rank has left or joined the group while it recorded: start again"

Part = tuple[RoutingTrace, bool]  # the trace of a rank, and whether there was more


class TraceRecording:
    """This rank's part of a recording. Odd marks start one, even marks end it; rank 0 writes the file.

    Of marks that come between the same two steps only the last one counts.

    Each rank keeps an equal part of the tokens, and all of it in memory. Where one is full before the others the
    trace ends.

    Args:
        identity: of the model, which the trace names; None: unknown.
        model: it is recorded.
        group: its ranks; marks reach them between the same two steps.
        batch: returns the requests in this rank's step.
        directory: where rank 0 writes traces; None: nowhere, and no mark comes.
        max_tokens: of a trace, all ranks together.
        on_result: called with the result of a recording that has ended, on rank 0.
    """

    def __init__(
        self,
        identity: ModelIdentity | None,
        model: PreTrainedModel,
        group: EPGroup,
        batch: Callable[[], Batch],
        directory: str | None,
        max_tokens: int,
        on_result: Callable[[Recorded | RecordingFailed], None],
    ) -> None:
        self._identity = identity
        self._model = model
        self._group = group
        self._batch = batch
        self._directory = directory
        self._max_tokens = -(-max_tokens // group.size)
        self._on_result = on_result
        self._leads = group.rank == 0
        self._recorder: RoutingRecorder | None = None
        self._sequences: dict[str, int] = {}  # number of each request that was seen
        self._problem = ""  # why the recording under way has no result

    def regroup(self, mark: int, leads: bool) -> None:
        """Give up a recording, under way or about to end: the ranks of the group have changed.

        Args:
            mark: the last one that any rank was given.
            leads: whether this rank writes the files from now on.
        """
        self._leads = leads
        if self._recorder is not None:
            _end(self._recorder)
            self._recorder = None
        if mark:
            self._problem = CHANGED
        if mark and mark % 2 == 0 and leads:  # nobody waits for it, unless the change has cut its end off
            self._on_result(RecordingFailed(CHANGED))

    def mark(self, number: int) -> None:
        """Start or end a recording; every rank calls this."""
        if number % 2:
            self._sequences, self._problem = {}, ""
            self._recorder = RoutingRecorder(self._model, self._max_tokens, self._step_info)
            self._recorder.__enter__()
            return
        recorder, self._recorder = self._recorder, None
        parts = self._group.all_gather_object(None if recorder is None else _end(recorder))
        if self._leads:
            # On a thread: the next step need not wait for the disk.
            threading.Thread(target=self._write, args=(parts,), name="rq_ep recording", daemon=True).start()

    def _step_info(self) -> StepInfo:
        batch = self._batch()
        numbers = [self._sequences.setdefault(request_id, len(self._sequences)) for request_id, _ in batch.parts]
        sequence_T = np.repeat(np.array(numbers, np.int64), [num_tokens for _, num_tokens in batch.parts])
        return StepInfo(PHASES.index("prefill" if batch.is_prefill else "decode"), sequence_T)

    def _write(self, parts: list[Part | None]) -> None:
        self._on_result(self._result([part for part in parts if part is not None]))

    def _result(self, parts: list[Part]) -> Recorded | RecordingFailed:
        if len(parts) < len(self._group.members):
            return RecordingFailed(self._problem or NOTHING)
        traces, are_full = zip(*parts, strict=True)
        name = f"trace-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.safetensors"
        path = Path(self._directory or ".") / name
        try:
            num_steps = min(len(trace.tokens_S) for trace in traces)
            joined = RoutingTrace.joined([trace.head(num_steps) for trace in traces])
            replace(joined, model=self._identity).save(path)
        except UserError as error:  # it names the path
            return RecordingFailed(str(error))
        except Exception as error:  # whatever it is, the server goes on without the trace
            log.exception("a recording could not be written to %s", path)
            return RecordingFailed(f"{path}: {type(error).__name__}: {error}")
        num_tokens = len(joined.ids_NLK)
        log.info("recorded %d steps of %d tokens to %s%s", num_steps, num_tokens, path, ", its limit" * any(are_full))
        return Recorded(str(path), num_steps, num_tokens, any(are_full))


def _end(recorder: RoutingRecorder) -> Part | None:
    recorder.__exit__(None, None, None)
    try:
        return recorder.trace(), recorder.is_full
    except UserError:  # no step
        return None
