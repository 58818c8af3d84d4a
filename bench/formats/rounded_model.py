"""A small dense model whose experts are, for a while, what weight formats make of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from rq_ep.core.arrays import BoolArray
from rq_ep.formats import get_format
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.calibration.rounding import ROUNDINGS
from rq_ep.model.evaluation.quality import Quality, nll, recording_topk_ids, routing_shift
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.windows import WindowBatch
from rq_ep.moe.expert_family import ExpertFamily

Forward = Callable[..., Tensor]
Routes = tuple[Tensor, Tensor]  # topk_ids_TK, topk_weights_TK
Change = Callable[[int, Forward], Forward]  # layer, its experts' forward method -> another


@dataclass
class Answers(Quality):
    """How far a changed model is from the dense one, window by window."""

    shift: list[float] = field(default_factory=list)  # share of the dense routers' choices not made here, all layers


@dataclass
class RoundedModel:
    """A dense model, what it says of some text, and what it says of it with other experts."""

    network: PreTrainedModel
    experts: Sequence[ExpertsModule]
    family: ExpertFamily
    batches: Sequence[WindowBatch]
    dense_BTV: list[Tensor]  # logits, batch by batch
    dense_nll: float  # nats per token
    dense_routes: list[list[Routes]]  # [L] what the routers chose, batch by batch
    rows_LE: list[list[Tensor]]  # inputs that the experts met in calibration, for calibrated rounding
    rounded: dict[str, list[dict[str, Tensor]]]  # the last format -> [L] the experts' tensors as it gives them back

    @classmethod
    def of(
        cls, loaded: LoadedModel, batches: Sequence[WindowBatch], rows_LE: list[list[Tensor]] | None = None
    ) -> "RoundedModel":
        """
        Args:
            loaded: the model, in fp32.
            batches: the text that it is evaluated on.
            rows_LE: inputs of each expert, where formats are named with `:calibrated`.
        """
        network = loaded.model
        routes: list[list[Routes]] = [[] for _ in loaded.experts]

        def remember(layer: int, plain: Forward) -> Forward:
            def forward(hidden_TD: Tensor, *chosen: Tensor) -> Tensor:
                routes[layer].append((chosen[0], chosen[1]))
                return plain(hidden_TD, *chosen)

            return forward

        with _changed([layer.module for layer in loaded.experts], remember):
            dense = [_logits(network, batch) for batch in batches]
        losses = [loss for logits, batch in zip(dense, batches, strict=True) for loss in nll(logits, batch.tokens_BT)]
        return cls(
            network, loaded.experts, loaded.family, batches, dense, float(np.mean(losses)), routes, rows_LE or [], {}
        )  # fmt: skip

    def low(self, name: str, low_LE: BoolArray) -> Answers:
        """The experts of `low_LE` in format `name`, all others as they are."""
        with self.while_low(name, low_LE):
            return self._answers()

    def while_low(self, name: str, low_LE: BoolArray) -> AbstractContextManager[None]:
        """While open, the experts of `low_LE` are in format `name`."""

        def change(layer: int, plain: Forward) -> Forward:
            module = self.experts[layer].module
            low_E = torch.from_numpy(low_LE[layer])
            mixed = {
                tensor: torch.where(low_E.view(-1, *[1] * (kept.ndim - 1)), self._rounded(name)[layer][tensor], kept)
                for tensor, kept in module.named_parameters()
            }
            return lambda *arguments: _called(module, mixed, arguments)

        return _changed([layer.module for layer in self.experts], change)

    def all_low_on_dense_routes(self, name: str) -> Answers:
        """All experts in format `name`, but what they get is what the dense model's routers chose."""

        def change(layer: int, plain: Forward) -> Forward:
            module, rounded = self.experts[layer].module, self._rounded(name)[layer]
            routes = iter(self.dense_routes[layer])
            return lambda hidden_TD, *chosen: _called(module, rounded, (hidden_TD, *next(routes)))

        with _changed([layer.module for layer in self.experts], change):
            return self._answers()

    def half_low(self, name: str, by_gate: bool) -> Answers:
        """Every expert computes half of its pairs of a pass in format `name`: those of lowest gates, or any."""
        generator = torch.Generator().manual_seed(0)

        def change(layer: int, plain: Forward) -> Forward:
            experts, rounded = self.experts[layer], self._rounded(name)[layer]

            def forward(hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
                order_TK = topk_weights_TK if by_gate else torch.rand(topk_ids_TK.shape, generator=generator)
                is_low_TK = torch.zeros(topk_ids_TK.shape, dtype=torch.bool)
                for expert in topk_ids_TK.unique():
                    of_expert = topk_ids_TK == expert
                    is_low_TK |= of_expert & (order_TK < order_TK[of_expert].median())
                low_TK, high_TK = (topk_weights_TK.masked_fill(mask, 0) for mask in (~is_low_TK, is_low_TK))
                out_TD = _called(experts.module, rounded, (hidden_TD, topk_ids_TK, low_TK))
                return out_TD + plain(hidden_TD, topk_ids_TK, high_TK)

            return forward

        with _changed([layer.module for layer in self.experts], change):
            return self._answers()

    def _answers(self) -> Answers:
        """The model as it is now."""
        answers = Answers()
        with recording_topk_ids([layer.module for layer in self.experts]) as choices:
            for number, (expected, batch) in enumerate(zip(self.dense_BTV, self.batches, strict=True)):
                answers.add(expected, _logits(self.network, batch), batch.tokens_BT)
                dense = [routes[number][0] for routes in self.dense_routes]
                answers.shift += np.mean(routing_shift(dense, choices, len(batch.tokens_BT)), axis=0).tolist()
        return answers

    def _rounded(self, name: str) -> list[dict[str, Tensor]]:
        if name not in self.rounded:
            self.rounded = {name: [self._round_trip(layer, name) for layer in range(len(self.experts))]}
        return self.rounded[name]

    @torch.no_grad()
    def _round_trip(self, layer: int, name: str) -> dict[str, Tensor]:
        """The tensors of a layer's experts, packed in a format and unpacked."""
        base, _, rounding = name.partition(":")
        format_, layout = get_format(base), self.family.layout
        experts = self.experts[layer]
        parameters = dict(experts.module.named_parameters())
        rounded = {tensor: torch.empty_like(parameter) for tensor, parameter in parameters.items()}
        for expert in range(experts.num_experts):
            weights = {tensor: parameter[expert] for tensor, parameter in parameters.items()}
            rows_ND = self.rows_LE[layer][expert] if rounding else torch.empty(0, self.family.hidden_size)
            packed = ROUNDINGS[rounding or "nearest"](format_, weights, rows_ND, self.family)
            for tensor, parameter in rounded.items():
                parameter[expert] = format_.dequantize(format_.views(packed, layout), tensor, layout, parameter.dtype)
        return rounded


@torch.no_grad()
def _logits(network: PreTrainedModel, batch: WindowBatch) -> Tensor:
    logits_BTV: Tensor = network(batch.tokens_BT, use_cache=False).logits
    return logits_BTV


def _called(module: nn.Module, tensors: Mapping[str, Tensor], arguments: Sequence[Tensor]) -> Tensor:
    """The module's own forward method, with other tensors."""
    changed = module.__dict__.pop("forward")
    try:
        out: Tensor = functional_call(module, dict(tensors), tuple(arguments))
        return out
    finally:
        module.__dict__["forward"] = changed


@contextmanager
def _changed(modules: Sequence[nn.Module], change: Change) -> Iterator[None]:
    """While open, every module's forward method is what `change` makes of it."""
    try:
        for layer, module in enumerate(modules):
            module.__dict__["forward"] = change(layer, type(module).forward.__get__(module))
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
