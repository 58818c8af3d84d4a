"""Recording what the router chose while a model runs."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.local_experts import LocalExperts
from rq_ep.sim.traces import RoutingTrace


class StepNote(NamedTuple):
    """What is known of a step beside its routing: its index in `PHASES`, and the number of each token's sequence."""

    phase: int
    sequence_T: IntArray


class RoutingRecorder:
    """Keeps, inside `with`, the experts and weights of every token that a model's MoE layers see on this rank.

    Every layer call copies them to the host, which waits for a GPU: for traces, not for everyday serving.
    """

    def __init__(
        self, model: nn.Module, max_tokens: int | None = None, note: Callable[[], StepNote] | None = None
    ) -> None:
        """
        Args:
            model: one whose experts are ours.
            max_tokens: tokens to keep, and steps; the first step that does not fit ends the trace. Default: all.
            note: asked in each step, before the step's first layer is entered.
        """
        self._modules: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, EPExperts | LocalExperts):
                self._modules[module.placement.index] = module
                self._num_experts = module.placement.num_experts
        if not self._modules:
            raise UserError("no expert-parallel layers to record: load the model with rq_ep.load")
        self._max_tokens = max_tokens
        self._note = note
        self.is_full = False
        self._tokens_S: list[int] = []
        self._notes: list[StepNote] = []  # of each step
        self._ids: list[npt.NDArray[np.int32]] = []  # of each step, [T, L, K]
        self._weights: list[npt.NDArray[np.float32]] = []
        self._num_tokens = 0
        self._next = 0  # place of the layer that is to come next
        self._is_uneven = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for at, module in enumerate(self._modules.values()):
            self._hooks.append(module.register_forward_pre_hook(self._recording(at)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def trace(self) -> RoutingTrace:
        """What was recorded; a step is one call of every layer.

        Raises:
            UserError: there was no step, or its layers saw different tokens.
        """
        if self._is_uneven or self._next or not self._tokens_S:
            raise UserError("no step was recorded in which every layer saw the same tokens")
        return RoutingTrace(
            np.concatenate(self._ids),
            np.concatenate(self._weights),
            np.array(self._tokens_S, np.int64),
            self._num_experts,
            tuple(self._modules),
            sequence_N=np.concatenate([note.sequence_T for note in self._notes]) if self._notes else None,
            phase_S=np.array([note.phase for note in self._notes], np.int64) if self._notes else None,
        )

    def _recording(self, at: int) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            ids_TK, weights_TK = arguments[1:]
            if at == 0:
                self._begin(*ids_TK.shape)
            if self.is_full:
                return
            if at != self._next or len(ids_TK) != self._tokens_S[-1]:
                self._is_uneven = True
                return
            self._next = (at + 1) % len(self._modules)
            self._ids[-1][:, at] = ids_TK.detach().int().cpu().numpy()
            self._weights[-1][:, at] = weights_TK.detach().float().cpu().numpy()

        return record

    def _begin(self, num_tokens: int, top_k: int) -> None:
        """Make room for a step."""
        used = max(self._num_tokens + num_tokens, len(self._tokens_S) + 1)
        self.is_full |= self._max_tokens is not None and used > self._max_tokens
        if self.is_full:
            return
        self._num_tokens += num_tokens
        self._tokens_S.append(num_tokens)
        shape = num_tokens, len(self._modules), top_k
        self._ids.append(np.empty(shape, np.int32))
        self._weights.append(np.empty(shape, np.float32))
        if self._note is not None:
            note = self._note()
            assert len(note.sequence_T) == num_tokens, (len(note.sequence_T), num_tokens)
            self._notes.append(note)
