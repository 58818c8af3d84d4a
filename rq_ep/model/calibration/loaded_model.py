"""A model that is calibrated or quantized, with its routed experts: whole in this process, or sharded over ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rq_ep.core.stats import ModelIdentity
from rq_ep.formats import native_format_name
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.quantized_checkpoint import has_low_bit_experts, open_checkpoint
from rq_ep.model.dtypes import stored_expert_format, torch_dtype
from rq_ep.model.load.sharded_model import load_sharded_model
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.model_folder import find_model, folder_of
from rq_ep.model.seam.expert_modules import ExpertsModule, find_expert_modules
from rq_ep.model.settings import CalibrationSettings, QuantizeSettings
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.parallel import EPGroup
from rq_ep.parallel.default_group import default_group, own_device


def find_source(
    model: str | Path | PreTrainedModel, settings: CalibrationSettings | QuantizeSettings, group: EPGroup | None
) -> tuple[Path | PreTrainedModel, EPGroup | None]:
    """The folder of a checkpoint and the ranks over which its experts are to be sharded, or a model in memory.

    Args:
        model: checkpoint directory, name of the hub, or a model in memory.
        settings: say the revision of a model of the hub, and the device.
        group: the ranks, all of which call this; default: all processes of the launcher, or this one.
    """
    if isinstance(model, PreTrainedModel):
        return model, None
    group = default_group(settings.device) if group is None else group
    return find_model(model, settings.revision, group), group


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model, its routed experts, and the ranks that hold these."""

    model: PreTrainedModel
    identity: ModelIdentity | None  # of a model that lies on disk
    native_format: str  # in which its experts are stored
    experts: tuple[ExpertsModule, ...]
    family: ExpertFamily
    group: EPGroup | None = None  # the ranks over which the experts are sharded; None: all are in this process
    is_quantized: bool = False  # some of its experts are stored in low bits

    @classmethod
    def open(
        cls,
        model: Path | PreTrainedModel,
        dtype: str | torch.dtype | None,
        device: str,
        group: EPGroup | None = None,
        *,
        strict_weights: bool = False,
    ) -> "LoadedModel":
        """Load the model of a checkpoint, or take one that is already in memory.

        Args:
            model: as `find_source` gives it.
            dtype: to compute in; default: as the weights are stored.
            device: auto, cpu or cuda; a model in memory, or a group, stays where it is.
            group: ranks over which the experts of a checkpoint are sharded; all of them call this. Default: this
                process alone.
            strict_weights: as in `load`.

        Raises:
            UserError: no such checkpoint, or one that cannot be served.
        """
        if isinstance(model, PreTrainedModel):
            return cls._in_memory(model)
        dtype = None if dtype is None else torch_dtype(dtype)
        network: Any
        experts: tuple[ExpertsModule, ...]
        if group is None or group.size == 1:
            network = load_whole_model(model, dtype or "auto", own_device(device), strict_weights=strict_weights)
            experts, shards = find_expert_modules(network), None
        else:
            network, experts = load_sharded_model(model, dtype, group, strict_weights=strict_weights)
            shards = group
        checkpoint = open_checkpoint(model)
        native_format = stored_expert_format(checkpoint)
        return cls(
            network, model_identity(model), native_format, experts, experts[0].family, shards,
            has_low_bit_experts(checkpoint),
        )  # fmt: skip

    @classmethod
    def _in_memory(cls, model: Any) -> "LoadedModel":
        experts = find_expert_modules(model.eval())
        folder = folder_of(model)
        identity = None if folder is None else model_identity(folder)
        native_format = native_format_name(experts[0].module.get_parameter("down_proj").dtype)
        return cls(model, identity, native_format, experts, experts[0].family)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.group is None or self.group.rank == 0
