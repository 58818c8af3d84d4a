"""Recording of the routing while a model runs."""

from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

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


class StepRouting:
    """Watches MoE layers, inside `with`: what the router chose for the tokens of each step, on the layers' device.

    Args:
        layers: in the order in which a forward pass enters them.
        on_step: called in the last layer of a step, with the experts [T, K] and the weights [T, K] of each layer. A
            step in which the layers are not entered one after another is left out.
    """

    def __init__(self, layers: Iterable[nn.Module], on_step: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        self._layers = list(layers)
        self._on_step = on_step
        self.has_gaps = False  # whether a step was left out
        self._ids: list[Tensor] = []  # of the step under way, by layer
        self._weights: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._ids, self._weights = [], []
        for position, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._take, position)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_watching(self) -> bool:
        return bool(self._hooks)

    def _take(self, position: int, _: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        if position != len(self._ids):
            self.has_gaps = True
            self._ids, self._weights = [], []
            if position:
                return
        self._ids.append(arguments[1])
        self._weights.append(arguments[2])
        if len(self._ids) == len(self._layers):
            ids, self._ids = self._ids, []
            weights, self._weights = self._weights, []
            self._on_step(ids, weights)


class RoutingRecorder:
    """Records, inside `with`, the experts and weights of every token that a model's MoE layers get on this rank.

    Every step copies them to the host, which waits for a GPU: for traces, not for everyday serving.
    """

    def __init__(
        self, model: nn.Module, max_tokens: int | None = None, step_info: Callable[[], StepInfo] | None = None
    ) -> None:
        """
        Args:
            model: with expert-parallel layers.
            max_tokens: tokens to keep, and steps; the first step that does not fit ends the trace. Default: all.
            step_info: called in each step.
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
        self._steps = StepRouting(self._modules.values(), self._keep)
        self._ids: list[npt.NDArray[np.int32]] = []  # of each step, [T, L, K]
        self._weights: list[npt.NDArray[np.float32]] = []
        self._num_tokens = 0
        self._is_uneven = False

    def __enter__(self) -> Self:
        self._steps.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._steps.__exit__(kind, error, traceback)

    def trace(self) -> RoutingTrace:
        """The recorded steps; a step is one call of every layer.

        Raises:
            UserError: there was no step, or its layers saw different tokens, or chose unequal numbers of experts.
        """
        if self._is_uneven or self._steps.has_gaps or not self._tokens_S:
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

    def _keep(self, ids_L: list[Tensor], weights_L: list[Tensor]) -> None:
        num_tokens = len(ids_L[0])
        size = max(self._num_tokens + num_tokens, len(self._tokens_S) + 1)
        self.is_full |= self._max_tokens is not None and size > self._max_tokens
        self._is_uneven |= any(ids_TK.shape != ids_L[0].shape for ids_TK in ids_L)
        if self.is_full or self._is_uneven:
            return
        self._num_tokens += num_tokens
        self._tokens_S.append(num_tokens)
        self._ids.append(torch.stack(ids_L, 1).int().cpu().numpy())
        self._weights.append(torch.stack(weights_L, 1).detach().float().cpu().numpy())
        if self._step_info is not None:
            info = self._step_info()
            assert len(info.sequence_T) == num_tokens, (len(info.sequence_T), num_tokens)
            self._infos.append(info)
