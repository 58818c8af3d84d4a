"""A model whose experts are sharded over ranks that all run the same text, for calibration.

Every rank holds the rest of the model, and sees the inputs, routing and outputs of every expert, as one process would.
What needs an expert's weights is done on the rank that holds them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rq_ep.formats.native import Native
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe import EPExperts, ExpertBank, ExpertFamily
from rq_ep.parallel import EPGroup


class ReplicatedInputExperts(nn.Module):
    """An expert-parallel layer for inputs that all ranks have: each sends a slice of the rows, all get every output.

    DeepSpeed-MoE does the same in tensor-parallel groups, by dropping and gathering tokens.
    """

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
        slices_R = [tensor.tensor_split(group.size) for tensor in (hidden_TD, topk_ids_TK, topk_weights_TK)]
        out_MD = self.layer(*(slices[group.rank] for slices in slices_R))
        sizes = [len(part) for part in slices_R[0]]
        return group.all_to_all(out_MD.repeat(group.size, 1), [len(out_MD)] * group.size, sizes)


class ShardedExperts(ExpertsModule):
    """The routed experts of one layer, some of which are held by this rank."""

    module: ReplicatedInputExperts

    @property
    def num_experts(self) -> int:
        return self.module.layer.placement.num_experts

    @property
    def family(self) -> ExpertFamily:
        return self.module.layer.family

    @property
    def rank_of_expert(self) -> dict[int, int]:
        """Expert -> the rank that holds it."""
        return {replica.expert: replica.rank for replica in self.module.layer.placement.replicas}

    @property
    def local_experts(self) -> Sequence[int]:
        return self.module.bank.experts

    def weights(self, expert: int) -> dict[str, Tensor]:
        bank = self.module.bank
        format_ = bank.format_of(expert)
        views = format_.views(bank.packed(expert), bank.layout)
        dtype = format_.dtype if isinstance(format_, Native) else torch.float32
        return {name: format_.dequantize(views, name, bank.layout, dtype) for name in bank.layout.shapes}


def load_sharded_model(
    path: str | Path, dtype: torch.dtype | None, group: EPGroup, *, strict_weights: bool = False
) -> tuple[PreTrainedModel, tuple[ShardedExperts, ...]]:
    """Load the model of a checkpoint with its experts in contiguous blocks on the ranks; every rank calls this.

    Args:
        path: checkpoint directory.
        dtype: to compute in; default: as the weights are stored.
        group: the ranks.
        strict_weights: as in `load`.

    Raises:
        UserError: what `load` raises, on every rank.
    """
    model = load(path, strategy="standard", group=group, dtype=dtype, strict_weights=strict_weights)
    names = {module: name for name, module in model.named_modules()}
    sharded = []
    for layer in report_of(model).layers:
        assert isinstance(layer, EPExperts)
        wrapped = ReplicatedInputExperts(layer)
        model.set_submodule(names[layer], wrapped)
        sharded.append(ShardedExperts(layer.placement.index, names[layer], wrapped))
    return model, tuple(sharded)
