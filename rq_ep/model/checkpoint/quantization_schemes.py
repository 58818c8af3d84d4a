"""The `quantization_config` of a checkpoint: by which method, and how a module's low-bit weights are scaled.

It does not say which modules are quantized (`ignore`, `modules_to_not_convert`): what is stored does.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rq_ep.core.errors import UserError


@dataclass(frozen=True)
class WeightScheme:
    """How the numbers of a matrix [out, in] are meant, and which of them share a scale."""

    kind: str  # int or float
    num_bits: int
    block: tuple[int, int] | None = None  # output channels and inputs that share a scale; None: a channel, or all

    def __str__(self) -> str:
        block = "channel or tensor" if self.block is None else f"{self.block[0]} x {self.block[1]} block"
        return f"{self.kind} of {self.num_bits} bits with a scale for each {block}"


@dataclass(frozen=True)
class QuantizationScheme:
    """The method of a checkpoint, and the weight schemes that its targets name."""

    method: str  # fp8, mxfp4 or compressed-tensors
    groups: Sequence[tuple[Sequence[str], WeightScheme]]  # targets, and what holds for the modules that they match

    def of_module(self, module: str) -> WeightScheme:
        """The weight scheme of a module that is stored in low bits.

        As in compressed-tensors, names are matched before patterns, and these before classes of modules.

        Raises:
            UserError: no target matches, or several that differ.
        """
        if len(schemes := {scheme for _, scheme in self.groups}) == 1:
            return schemes.pop()
        matches = (_is_name, _is_pattern, _is_class)
        for match in matches:
            found = {scheme for targets, scheme in self.groups if any(match(target, module) for target in targets)}
            if len(found) == 1:
                return found.pop()
            if found:
                raise UserError(
                    f"quantization_config.config_groups: targets of several groups match {module}: "
                    f"{'; '.join(sorted(map(str, found)))}: save a bf16 copy of the model"
                )
        raise UserError(
            f"quantization_config.config_groups: no group's targets match {module}, whose weights are stored in low "
            "bits: save a bf16 copy of the model"
        )


def quantization_scheme(config: Mapping[str, Any], what: str) -> QuantizationScheme | None:
    """The scheme of a checkpoint, by its `quantization_config`, or `compression_config` of old; None without one.

    Args:
        config: `config.json`.
        what: the checkpoint, for messages.

    Raises:
        UserError: the scheme is not supported; the message names the key and its value.
    """
    key = next((key for key in CONFIG_KEYS if config.get(key)), None)
    if key is None:
        return None
    settings = config[key]
    if key == "compression_config" and isinstance(settings, dict):
        settings = {**settings, **(settings.get("quantization_config") or {})}
        settings.setdefault("quant_method", "compressed-tensors")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or not isinstance(method, str) or method not in _METHODS:
        raise UserError(
            f"{what}: the weights are quantized by {method!r:.40}, which is not supported; supported are "
            f"{', '.join(_METHODS)}: {_INSTEAD}"
        )
    try:
        return QuantizationScheme(method, _METHODS[method](settings))
    except _UnsupportedError as reason:
        raise UserError(f"{what}: config.json's {key}.{reason}, which is not supported: {_INSTEAD}") from None


CONFIG_KEYS = ("quantization_config", "compression_config")  # of config.json
_INSTEAD = "save a bf16 copy (from_pretrained with dequantization, then save_pretrained) and use that"


class _UnsupportedError(Exception):
    """A setting that is not supported: its name and value."""


def _mxfp4(settings: Mapping[str, Any]) -> list[tuple[list[str], WeightScheme]]:
    return [([], WeightScheme("float", 4, (1, 32)))]


def _fp8(settings: Mapping[str, Any]) -> list[tuple[list[str], WeightScheme]]:
    """e4m3 numbers: blocks as of DeepSeek-V3, else a scale for each tensor or channel, as stored."""
    if settings.get("fmt", "e4m3") != "e4m3":
        raise _UnsupportedError(f"fmt is {settings['fmt']!r:.40}")
    block = settings.get("weight_block_size")
    return [([], WeightScheme("float", 8, None if block is None else _block_size("weight_block_size", block)))]


def _compressed(settings: Mapping[str, Any]) -> list[tuple[list[str], WeightScheme]]:
    """compressed-tensors: symmetric int of 8 and 4 bits and fp8, in groups of modules."""
    for name, allowed in (("format", _FORMATS), ("sparsity_config.format", (None, "dense"))):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in allowed:
            raise _UnsupportedError(f"{name} is {value!r:.40}")
    if settings.get("transform_config"):
        raise _UnsupportedError(f"transform_config is {settings['transform_config']!r:.60}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _UnsupportedError(f"config_groups is {groups!r:.60}")
    schemes = []
    for name, group in groups.items():
        if group.get("weights") is None:
            continue  # quantizes activations, or the KV cache
        targets = group.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise _UnsupportedError(f"config_groups.{name}.targets is {targets!r:.60}")
        for target in targets:
            _check_pattern(target, f"config_groups.{name}.targets")
        if group.get("format") not in _FORMATS:
            raise _UnsupportedError(f"config_groups.{name}.format is {group['format']!r:.40}")
        schemes.append((targets, _weights(f"config_groups.{name}.weights", group["weights"])))
    if not schemes:
        raise _UnsupportedError(f"config_groups is {groups!r:.60} and quantizes no weights")
    return schemes


def _weights(name: str, weights: Any) -> WeightScheme:
    """A group's scheme, from its `weights`."""
    if not isinstance(weights, dict):
        raise _UnsupportedError(f"{name} is {weights!r:.60}")
    kind, num_bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    if (kind, num_bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise _UnsupportedError(f"{name} is {kind} of {num_bits!r:.40} bits")
    if not weights.get("symmetric", True):
        raise _UnsupportedError(f"{name}.symmetric is {weights['symmetric']!r:.40}")
    group_size = weights.get("group_size")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    match strategy:
        case "tensor" | "channel":
            return WeightScheme(kind, num_bits)
        case "group" if type(group_size) is int and group_size > 0:
            return WeightScheme(kind, num_bits, (1, group_size))
        case "block":
            return WeightScheme(kind, num_bits, _block_size(f"{name}.block_structure", weights.get("block_structure")))
    size = f" and its group_size {group_size!r:.40}" if strategy == "group" else ""
    raise _UnsupportedError(f"{name}.strategy is {strategy!r:.40}{size}")


def _block_size(name: str, block: Any) -> tuple[int, int]:
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    raise _UnsupportedError(f"{name} is {block!r:.40}")


def _check_pattern(target: str, name: str) -> None:
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (re.error, RecursionError, OverflowError):
        raise _UnsupportedError(f"{name} has {target!r:.60}") from None


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _is_class(target: str, module: str) -> bool:
    """Whether a target may name the class of a module: checkpoints hold low-bit weights of linear layers only."""
    return target == "Linear"


# Compressors whose tensors we know; which of them wrote a tensor is seen by its name and dtype.
_FORMATS = (
    None, "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
)  # fmt: skip
_METHODS = {"mxfp4": _mxfp4, "fp8": _fp8, "compressed-tensors": _compressed}
