"""What the router chose, token by token, in the steps that calibration takes."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.stats import ModelIdentity
from rq_ep.model.calibration.layer_records import LayerRecord
from rq_ep.sim.traces import RoutingTrace

Array = TypeVar("Array", IntArray, FloatArray)


class RouteLog:
    """Collects steps out of forward passes over whole sequences, and makes a trace of them."""

    def __init__(self) -> None:
        self._ids: list[IntArray] = []  # of each step, [n, L, K]
        self._weights: list[FloatArray] = []
        self._sequences: list[IntArray] = []  # of each step, [n]
        self._phases: list[int] = []
        self._num_sequences = 0
        self._numbers_BT = np.zeros((0, 0), np.int64)  # sequence of each token of the batch that has run

    def begin(self, shape_BT: tuple[int, int]) -> None:
        """A batch has run: B sequences of T tokens, which no batch before had."""
        self._numbers_BT = self._num_sequences + np.repeat(np.arange(shape_BT[0])[:, None], shape_BT[1], axis=1)
        self._num_sequences += shape_BT[0]

    def add(self, phase: int, records: Sequence[LayerRecord], positions: slice) -> None:
        """A step of the tokens at some positions of the batch's sequences."""
        numbers_BT = self._numbers_BT

        def of_step(values_LNK: list[Array]) -> Array:
            by_layer = [values_NK.reshape(*numbers_BT.shape, -1)[:, positions] for values_NK in values_LNK]
            return np.stack([values_BTK.reshape(-1, values_BTK.shape[-1]) for values_BTK in by_layer], axis=1)

        self._ids.append(of_step([record.topk_ids_TK for record in records]))
        self._weights.append(of_step([record.topk_weights_TK for record in records]))
        self._sequences.append(numbers_BT[:, positions].ravel())
        self._phases.append(phase)

    def trace(self, num_experts: int, layers: tuple[int, ...], model: ModelIdentity | None) -> RoutingTrace:
        """All steps so far."""
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
