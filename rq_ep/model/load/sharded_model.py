"""A model too large for one process, listened to: its experts lie on several ranks, and all ranks run the same text.

Every rank holds all of the model but the experts, and sees the inputs, routes and outputs of every expert, as one
process would. What takes the weights themselves, a rank does for the experts that it holds.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rq_ep.model.load.load_model import LoadReport, load
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe import EPExperts, ExpertBank, ExpertFamily
from rq_ep.parallel import EPGroup


class SameRows(nn.Module):
    """An expert-parallel layer on ranks that have the same rows: each sends a run of them, all get every output."""

    def __init__(self, layer: EPExperts) -> None:
        super().__init__()
        self.layer = layer

    @property
    def bank(self) -> ExpertBank:
        """The experts that this rank holds."""
        return self.layer.bank

    def forward(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """out_TD [T, D], the same on every rank; every rank calls this with the same rows."""
        group = self.layer.group
        runs = [tensor.tensor_split(group.size) for tensor in (hidden_TD, topk_ids_TK, topk_weights_TK)]
        own_MD = self.layer(*(run[group.rank] for run in runs))
        sizes = [len(run) for run in runs[0]]
        return group.all_to_all(own_MD.repeat(group.size, 1), [len(own_MD)] * group.size, sizes)


class SpreadExperts(ExpertsModule):
    """The routed experts of one layer, some of which lie here."""

    module: SameRows

    @property
    def num_experts(self) -> int:
        return self.module.layer.placement.num_experts

    @property
    def family(self) -> ExpertFamily:
        return self.module.layer.family

    @property
    def homes(self) -> dict[int, int]:
        """Expert -> the rank that holds it."""
        return {replica.expert: replica.rank for replica in self.module.layer.placement.replicas}

    @property
    def held(self) -> Sequence[int]:
        return self.module.bank.experts

    def weights(self, expert: int) -> dict[str, Tensor]:
        bank = self.module.bank
        format_ = bank.format_of(expert)
        views = format_.views(bank.packed(expert), bank.layout)
        dtype = getattr(format_, "dtype", torch.float32)
        return {name: format_.dequantize(views, name, bank.layout, dtype) for name in bank.layout.shapes}


def read_spread(
    path: str | Path, dtype: torch.dtype | None, group: EPGroup
) -> tuple[PreTrainedModel, tuple[SpreadExperts, ...]]:
    """The model of a checkpoint with its experts in contiguous blocks on the ranks; every rank calls this.

    Args:
        path: checkpoint directory.
        dtype: to compute in; default: as the weights are stored.
        group: the ranks.

    Raises:
        UserError: what `load` raises, on every rank.
    """
    network = load(path, strategy="standard", group=group, dtype=dtype)
    report: LoadReport = network.rq_ep  # type: ignore[assignment]
    names = {module: name for name, module in network.named_modules()}
    found = []
    for layer in report.layers:
        assert isinstance(layer, EPExperts)
        shared = SameRows(layer)
        network.set_submodule(names[layer], shared)
        found.append(SpreadExperts(layer.placement.index, names[layer], shared))
    return network, tuple(found)
