"""Which tensors of a checkpoint make which tensor of a model, by transformers' rules.

Most checkpoints store each expert's matrices separately, under other names than the model's; transformers renames and
fuses them when it loads a whole model.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from rq_ep.model.seam.adapters import adapter_for


class SourceTensor(NamedTuple):
    """A checkpoint tensor that goes into a tensor of the model."""

    key: str
    pattern: str  # the converter's pattern that it matched; the key itself if nothing is converted
    expert: int | None  # that it belongs to, if the checkpoint stores experts separately


@dataclass(frozen=True)
class TensorConversion:
    """How a tensor of the model, or several that the checkpoint stores fused, is made from checkpoint tensors."""

    target: str
    converter: WeightConverter | None
    sources: list[SourceTensor] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.target]
        first = self.converter.target_patterns[0]
        return [self.target.replace(first, pattern) for pattern in self.converter.target_patterns]

    def of_expert(self, expert: int) -> list[SourceTensor]:
        """The sources of an expert's tensor."""
        return self._by_expert.get(None) or self._by_expert.get(expert, [])

    @cached_property
    def _by_expert(self) -> dict[int | None, list[SourceTensor]]:
        by_expert: dict[int | None, list[SourceTensor]] = {}
        for source in self.sources:
            by_expert.setdefault(source.expert, []).append(source)
        return by_expert


def find_conversions(
    model: PreTrainedModel, keys: Iterable[str], state: dict[str, torch.Tensor]
) -> dict[str, TensorConversion]:
    """Target name -> conversion, for all tensors of the checkpoint, renamed in the order of transformers' loader."""
    rules = [*get_model_conversion_mapping(model), *adapter_for(model.config.model_type).converters()]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    conversions: dict[str, TensorConversion] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        expert = None if pattern is None else _expert_number(apply_renamings(key, renamings), pattern)
        conversion = conversions.setdefault(target, TensorConversion(target, converter))
        conversion.sources.append(SourceTensor(key, pattern or key, expert))
    return {made.target: made for conversion in conversions.values() for made in _split_sets(conversion, state)}


def _split_sets(conversion: TensorConversion, state: dict[str, torch.Tensor]) -> Iterator[TensorConversion]:
    """A conversion, or one for each set of experts where the checkpoint numbers those of several sets in one row."""
    converter = conversion.converter
    if converter is None or not isinstance(converter.operations[0], ErnieFuseAndSplitTextVisionExperts):
        yield conversion
        return
    operations = [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(converter.source_patterns) > 1 else [])]
    num_experts = len(state[conversion.target])
    for i, target in enumerate(conversion.targets):
        fused = WeightConverter(converter.source_patterns, converter.target_patterns[i], operations)
        numbered = [(source, (source.expert or 0) - i * num_experts) for source in conversion.sources]
        is_last = i == len(conversion.targets) - 1  # which gets those too many, too, and is refused for them
        own = [s._replace(expert=e) for s, e in numbered if e >= 0 and (e < num_experts or is_last)]
        yield TensorConversion(target, fused, own)


def _expert_number(key: str, pattern: str) -> int | None:
    """The number at the `*` of a pattern such as `experts.*.w1.weight`; None without one."""
    match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), key) if "*." in pattern else None
    return None if match is None else int(match["expert"])
