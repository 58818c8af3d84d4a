"""Recording of the routing while a model runs."""

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


class StepInfo(NamedTuple):
    """A step beside its routing: the index of its phase in `PHASES`, and the number of each token's sequence."""

    phase: int
    sequence_T: IntArray


class RoutingRecorder:
    """Records, inside `with`, the experts and weights of every token that a model's MoE layers get on this rank.

    Every layer call copies them to the host, which waits for a GPU: for traces, not for everyday serving.
    """

    def __init__(
        self, model: nn.Module, max_tokens: int | None = None, step_info: Callable[[], StepInfo] | None = None
    ) -> None:
        """
        Args:
            model: with expert-parallel layers.
            max_tokens: tokens to keep, and steps; the first step that does not fit ends the trace. Default: all.
            step_info: called in each step before its first layer.
        """
        self._modules: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, EPExperts | LocalExperts):
                self._modules[module.placement.index] = module
                self._num_experts = module.placement.num_experts
        if not self._modules:
            raise UserError("no expert-parallel layers to record: load the model with rq_ep.load")
        self._max_tokens = max_tokens
        self._step_info = step_info
        self.is_full = False
        self._tokens_S: list[int] = []
        self._infos: list[StepInfo] = []  # of each step
        self._ids: list[npt.NDArray[np.int32]] = []  # of each step, [T, L, K]
        self._weights: list[npt.NDArray[np.float32]] = []
        self._num_tokens = 0
        self._next = 0  # position of the layer that is called next
        self._is_uneven = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for position, module in enumerate(self._modules.values()):
            self._hooks.append(module.register_forward_pre_hook(self._recording(position)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def trace(self) -> RoutingTrace:
        """The recorded steps; a step is one call of every layer.

        Raises:
            UserError: there was no step, or its layers saw different tokens, or chose unequal numbers of experts.
        """
        if self._is_uneven or self._next or not self._tokens_S:
            raise UserError("no step was recorded in which every layer saw the same tokens, and as many experts")
        return RoutingTrace(
            np.concatenate(self._ids),
            np.concatenate(self._weights),
            np.array(self._tokens_S, np.int64),
            self._num_experts,
            tuple(self._modules),
            sequence_N=np.concatenate([info.sequence_T for info in self._infos]) if self._infos else None,
            phase_S=np.array([info.phase for info in self._infos], np.int64) if self._infos else None,
        )

    def _recording(self, position: int) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            ids_TK, weights_TK = arguments[1:]
            if position == 0:
                self._begin(*ids_TK.shape)
            if self.is_full:
                return
            if position != self._next or ids_TK.shape != self._ids[-1][:, position].shape:
                self._is_uneven = True
                return
            self._next = (position + 1) % len(self._modules)
            self._ids[-1][:, position] = ids_TK.detach().int().cpu().numpy()
            self._weights[-1][:, position] = weights_TK.detach().float().cpu().numpy()

        return record

    def _begin(self, num_tokens: int, top_k: int) -> None:
        """Allocate the records of a step, if it fits."""
        size = max(self._num_tokens + num_tokens, len(self._tokens_S) + 1)
        self.is_full |= self._max_tokens is not None and size > self._max_tokens
        if self.is_full:
            return
        self._num_tokens += num_tokens
        self._tokens_S.append(num_tokens)
        shape = num_tokens, len(self._modules), top_k
        self._ids.append(np.empty(shape, np.int32))
        self._weights.append(np.empty(shape, np.float32))
        if self._step_info is not None:
            info = self._step_info()
            assert len(info.sequence_T) == num_tokens, (len(info.sequence_T), num_tokens)
            self._infos.append(info)
