"""Recording what the router chose while a model runs."""

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from rq_ep.core.errors import UserError
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.local import LocalExperts
from rq_ep.sim.traces import RoutingTrace


class RoutingRecorder:
    """Keeps, inside `with`, the experts and weights of every token that a model's MoE layers see on this rank.

    Every layer call copies them to the host, which waits for a GPU: for traces, not for serving.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: one whose experts are ours.
        """
        self._modules: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, EPExperts | LocalExperts):
                placed = module.layer if isinstance(module, EPExperts) else module.ranks[0].layer
                self._modules[placed.layer] = module
                self._num_experts = placed.num_experts
        if not self._modules:
            raise UserError("no expert-parallel layers to record: load the model with rq_ep.load")
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self._modules}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._recording(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def trace(self) -> RoutingTrace:
        """What was recorded; a step is one call of every layer."""
        num_tokens = {tuple(len(ids_TK) for ids_TK, _ in calls) for calls in self._seen.values()}
        if len(num_tokens) != 1 or num_tokens == {()}:
            raise UserError("no step was recorded in which every layer saw the same tokens")
        ids, weights = (
            torch.stack([torch.cat([call[part] for call in calls]) for calls in self._seen.values()], 1).numpy()
            for part in range(2)
        )
        return RoutingTrace(ids, weights, np.array(num_tokens.pop(), np.int64), self._num_experts, tuple(self._modules))

    def _recording(self, layer: int) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            ids_TK, weights_TK = arguments[1:]
            ids_TK, weights_TK = ids_TK.detach().to("cpu", copy=True), weights_TK.detach().to("cpu", copy=True)
            self._seen[layer].append((ids_TK.int(), weights_TK.float()))

        return record
