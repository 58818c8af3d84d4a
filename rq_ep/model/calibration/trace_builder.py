"""Building a routing trace, what the router chose token by token, from the steps of calibration.

Axes: B sequences of a batch, T positions of a sequence, N tokens.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ModelIdentity
from rq_ep.model.calibration.layer_records import LayerRecord
from rq_ep.sim.traces import RoutingTrace

Array = TypeVar("Array", IntArray, FloatArray)


class RoutingTraceBuilder:
    """Collects the routing of steps from forward passes over whole sequences, and makes a trace of them."""

    def __init__(self) -> None:
        self._ids: list[IntArray] = []  # of each step, [N, L, K]
        self._weights: list[FloatArray] = []
        self._sequences: list[IntArray] = []  # of each step, [N]
        self._phases: list[int] = []
        self._num_sequences = 0
        self._sequence_BT = np.zeros((0, 0), np.int64)  # sequence of each token of the batch that has run

    def begin_batch(self, num_sequences: int, length: int) -> None:
        """Number the sequences of the batch that has just run; no batch before had them."""
        numbers_B1 = self._num_sequences + np.arange(num_sequences)[:, None]
        self._sequence_BT = np.repeat(numbers_B1, length, axis=1)
        self._num_sequences += num_sequences

    def add_step(self, phase: int, records: Sequence[LayerRecord], positions: slice) -> None:
        """Add a step of the tokens at some positions of the batch's sequences."""
        sequence_BT = self._sequence_BT
        if len(widths := {record.topk_ids_TK.shape[1] for record in records}) > 1:
            raise UserError(
                f"--trace: layers choose {sorted(widths)} experts, and a trace has one number: leave it out"
            )

        def of_step(values_LNK: list[Array]) -> Array:
            by_layer = [values_NK.reshape(*sequence_BT.shape, -1)[:, positions] for values_NK in values_LNK]
            return np.stack([values_BTK.reshape(-1, values_BTK.shape[-1]) for values_BTK in by_layer], axis=1)

        self._ids.append(of_step([record.topk_ids_TK for record in records]))
        self._weights.append(of_step([record.topk_weights_TK for record in records]))
        self._sequences.append(sequence_BT[:, positions].ravel())
        self._phases.append(phase)

    def build(self, num_experts: int, layers: tuple[int, ...], model: ModelIdentity | None) -> RoutingTrace:
        """The trace of all steps so far."""
        return RoutingTrace(
            np.concatenate(self._ids).astype(np.int32),
            np.concatenate(self._weights).astype(np.float32),
            np.array([len(sequence_N) for sequence_N in self._sequences], np.int64),
            num_experts,
            layers,
            sequence_N=np.concatenate(self._sequences),
            phase_S=np.array(self._phases, np.int64),
            model=model,
        )
